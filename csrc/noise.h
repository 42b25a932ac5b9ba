// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cmath>
#include <cstdint>

#include "geometry/rounded.h"
#include "half.h"

namespace glimpse {

// Note [Noise]
// Outside its image a glimpse is random with TensorFlow's distributions:
//
//   uniform   between the smallest and the largest number of the image, all channels together
//   gaussian  mean and standard deviation of its channel, clipped to the channel's range
//
// The draw of an element is a function of the seed and of its place (image, channel, y, x) alone,
// so layout, threads, device and the other elements have no part in it, and what is drawn is the
// same on every device: a counter-based generator, no math library, statistics that are added up in
// one fixed order, and Rounded arithmetic throughout. TensorFlow gives all images (and for gaussian
// noise all channels) one field of random numbers, which correlates the glimpses of a batch; here
// every image and channel has its own.

/// 128 random bits.
struct RandomBits {
  uint32_t word[4];
};

/// Philox4x32-10 (Salmon et al. 2011): a block cipher of a counter, which serves as the generator.
GLIMPSE_HD RandomBits philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int32_t round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

namespace detail {

/// ((c7 r + c6) r + ...) r + c0.
GLIMPSE_HD Rounded<double> polynomial(Rounded<double> r, double c7, double c6, double c5, double c4,
                                      double c3, double c2, double c1, double c0) {
  using R = Rounded<double>;
  R sum = R(c7) * r + R(c6);
  sum = sum * r + R(c5);
  sum = sum * r + R(c4);
  sum = sum * r + R(c3);
  sum = sum * r + R(c2);
  sum = sum * r + R(c1);
  return sum * r + R(c0);
}

}  // namespace detail

/// The number that a standard normal variable stays below with probability p, 0 < p < 1: algorithm
/// AS 241 (Wichura 1988), PPND16, which is right to about 16 digits.
GLIMPSE_HD double normal_quantile(double p) {
  using R = Rounded<double>;
  using detail::polynomial;
  const R q = R(p) - R(0.5);
  if (q.value >= -0.425 && q.value <= 0.425) {
    const R r = R(0.180625) - q * q;
    const R top = polynomial(r, 2509.0809287301226727, 33430.575583588128105, 67265.770927008700853,
                             45921.953931549871457, 13731.693765509461125, 1971.5909503065514427,
                             133.14166789178437745, 3.3871328727963666080);
    const R bottom = polynomial(r, 5226.4952788528545610, 28729.085735721942674,
                                39307.895800092710610, 21213.794301586595867, 5394.1960214247511077,
                                687.18700749205790830, 42.313330701600911252, 1.0);
    return (top * q / bottom).value;
  }
  const R tail = q.value < 0 ? R(p) : R(1.0) - R(p);
  const R log2(portable_log2(tail.value));
  R r(rounded_sqrt((R(-0.69314718055994530942) * log2).value));
  R top, bottom;
  if (r.value <= 5.0) {
    r = r - R(1.6);
    top = polynomial(r, 7.74545014278341407640e-4, 2.27238449892691845833e-2,
                     2.41780725177450611770e-1, 1.27045825245236838258, 3.64784832476320460504,
                     5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734);
    bottom =
        polynomial(r, 1.05075007164441684324e-9, 5.47593808499534494600e-4,
                   1.51986665636164571966e-2, 1.48103976427480074590e-1, 6.89767334985100004550e-1,
                   1.67638483018380384940, 2.05319162663775882187, 1.0);
  } else {
    r = r - R(5.0);
    top =
        polynomial(r, 2.01033439929228813265e-7, 2.71155556874348757815e-5,
                   1.24266094738807843860e-3, 2.65321895265761230930e-2, 2.96560571828504891230e-1,
                   1.78482653991729133580, 5.46378491116411436990, 6.65790464350110377720);
    bottom =
        polynomial(r, 2.04426310338993978564e-15, 1.42151175831644588870e-7,
                   1.84631831751005468180e-5, 7.86869131145613259100e-4, 1.48753612908506148525e-2,
                   1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0);
  }
  const double tail_quantile = (top / bottom).value;
  return q.value < 0 ? -tail_quantile : tail_quantile;
}

/// What noise needs to know of the pixels of a plane, or of all planes of an image.
struct Statistics {
  double low, high;        // the smallest and the largest
  double mean, deviation;  // standard deviation of these pixels, not an estimate for others
};

/// The pixels of a plane are dealt to this many lanes in turn (pixel i to lane i % kLanes), each
/// lane adds its own up in order, and lane i then takes in lane i + kLanes/2, i + kLanes/4, ... 1.
/// This order is part of the result: every device keeps to it.
constexpr int32_t kStatisticsLanes = 256;

/// The smallest and largest number so far. NaN wins.
struct Range {
  double low, high;

  GLIMPSE_HD static Range none() { return {HUGE_VAL, -HUGE_VAL}; }
  GLIMPSE_HD void add(double lowest, double highest) {
    if (!(lowest >= low) && low == low) low = lowest;
    if (!(highest <= high) && high == high) high = highest;
  }
  /// 0 for -0: which zero was met first must not show. NaN where nothing was added.
  GLIMPSE_HD Statistics statistics() const {
    using R = Rounded<double>;
    const double none = low > high ? static_cast<double>(NAN) : 0.0;
    return {(R(low) + R(none)).value, (R(high) + R(none)).value, none, none};
  }
};

/// A random number between the ends of the range of an image.
GLIMPSE_HD double uniform_noise(const Statistics& image, const RandomBits& bits) {
  using R = Rounded<double>;
  const R u = R(static_cast<double>(bits.word[0])) * R(2.3283064365386962890625e-10);  // 2^-32
  // In halves, because the width of a range of finite numbers need not be finite.
  const R half(0.5), low = R(image.low) * half, high = R(image.high) * half;
  const double value = (R(2.0) * (low + u * (high - low))).value;
  return value < image.low ? image.low : value > image.high ? image.high : value;
}

/// A normal number with the moments of a channel, moved into its range.
GLIMPSE_HD double gaussian_noise(const Statistics& channel, const RandomBits& bits) {
  using R = Rounded<double>;
  const uint64_t whole = uint64_t{bits.word[0]} << 20 | bits.word[1] >> 12;  // 52 bits
  // 2^-52, so that p is a half off both ends.
  const R p = (R(static_cast<double>(whole)) + R(0.5)) * R(2.220446049250313080847e-16);
  const R z(normal_quantile(p.value));
  const double value = (R(channel.mean) + R(channel.deviation) * z).value;
  return value < channel.low ? channel.low : value > channel.high ? channel.high : value;
}

/// The noise of one element, from the statistics of its image (uniform) or channel (gaussian).
template <class T>
GLIMPSE_HD T noise_at(bool gaussian, const Statistics& statistics, uint64_t seed, int64_t image,
                      int64_t channel, int32_t y, int32_t x) {
  const RandomBits bits = philox(seed, static_cast<uint32_t>(x), static_cast<uint32_t>(y),
                                 static_cast<uint32_t>(channel), static_cast<uint32_t>(image));
  const double value =
      gaussian ? gaussian_noise(statistics, bits) : uniform_noise(statistics, bits);
  return Store<T>::from(static_cast<acc_t<T>>(value));
}

}  // namespace glimpse
