// SPDX-License-Identifier: BSD-3-Clause
//
// Masks into images of bits: words of 64 columns, written as the bytes that they are.
#include <cstdint>
#include <cstring>

#include "cpu/applications.h"
#include "cpu/dtypes.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/paste_words.h"

namespace glimpse {
namespace {

/// Writes bits 8 * byte .. of a row of the image, as many of the 64 as the row has.
void store_word(uint8_t* row, int64_t byte, int64_t row_bytes, uint64_t word) {
  const int64_t left = row_bytes - byte;
  const int64_t count = left < 8 ? left : 8;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (count == 8) {
    std::memcpy(row + byte, &word, 8);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) row[byte + i] = static_cast<uint8_t>(word >> (8 * i));
}

template <class T>
void paste_bits_of(const PasteProblem& problem, int64_t k, PasteWords<T>& pixels) {
  const int64_t row_bytes = problem.row_bytes();
  const int64_t bytes = problem.height * row_bytes;
  auto* image = static_cast<uint8_t*>(problem.image) + k * bytes;
  const bool background = pixels.background();
  if (!problem.cleared) std::memset(image, background ? 0xff : 0, static_cast<size_t>(bytes));
  if (background && problem.width % 8 != 0) {
    const auto last = static_cast<uint8_t>(0xff >> (8 - problem.width % 8));
    for (int64_t y = 1; y <= problem.height; ++y) image[y * row_bytes - 1] = last;
  }
  if (!pixels.start(k, 8)) return;
  if (problem.cleared) {
    populate_pages(reinterpret_cast<char*>(image + pixels.rows().first * row_bytes),
                   reinterpret_cast<char*>(image + pixels.rows().end * row_bytes));
  }

  const int64_t first_byte = pixels.origin() / 8;
  const auto byte_of = [&](int32_t w) { return first_byte + 8 * int64_t{w}; };
  const auto with_background = [&](int32_t w, uint64_t word) {
    const uint64_t reached = pixels.reached(w);
    if (!background) return word & reached;
    const int64_t inside = problem.width - 8 * byte_of(w);
    const uint64_t beyond = inside < 64 ? ~uint64_t{0} << inside : 0;
    return (word | ~reached) & ~beyond;
  };
  pixels.visit(
      [&](int32_t first, int32_t end, int32_t w, uint64_t word) {
        word = with_background(w, word);
        if (problem.cleared && word == 0) return;
        for (int64_t y = first; y < end; ++y) {
          store_word(image + y * row_bytes, byte_of(w), row_bytes, word);
        }
      },
      [&](int32_t first, int32_t rows, int32_t w, const uint64_t* word) {
        for (int64_t i = 0; i < rows; ++i) {
          store_word(image + (first + i) * row_bytes, byte_of(w), row_bytes,
                     with_background(w, word[i]));
        }
      });
}

}  // namespace

void cpu_paste_bits(const PasteProblem& problem) {
  const int64_t workers = workers_for(problem.masks * problem.height * problem.row_bytes());
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_tasks(problem.masks, workers, [&](const auto& next) {
      PasteWords<T> pixels(problem);
      for (int64_t k = next(); k < problem.masks; k = next()) paste_bits_of(problem, k, pixels);
    });
  });
}

}  // namespace glimpse
