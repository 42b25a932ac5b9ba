// SPDX-License-Identifier: BSD-3-Clause
//
// Vectors of the instruction set of the including file, which says how wide they are:
// GLIMPSE_VECTOR_BYTES is 64 (AVX-512), 32 (AVX2, FMA, F16C) or 16 (no intrinsics, any CPU).
// Included once by apply.h, inside the namespace of that set; the only file with intrinsics.

constexpr int kVectorBytes = GLIMPSE_VECTOR_BYTES;

/// A vector of kVectorBytes of A, with the operators of the compiler's vector extension.
template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

/// N integers, one for each lane of a Vector<float>.
template <class I>
struct LaneIntegers {
  typedef I type __attribute__((vector_size(sizeof(I) * kLanes<float>)));
};

#define GLIMPSE_INLINE static inline __attribute__((always_inline))
#define GLIMPSE_MEMBER static __attribute__((always_inline))

template <class A>
GLIMPSE_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

template <class V, class P>
GLIMPSE_INLINE V load_bits(const P* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

/// Adds the product with one rounding where the instruction set has that, with two elsewhere.
GLIMPSE_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if GLIMPSE_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif GLIMPSE_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
GLIMPSE_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if GLIMPSE_VECTOR_BYTES == 64
  return _mm512_fmadd_pd(a, b, c);
#elif GLIMPSE_VECTOR_BYTES == 32
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Loads of a whole vector: memory to numbers.

GLIMPSE_INLINE Vector<float> load(const float* from) { return load_bits<Vector<float>>(from); }
GLIMPSE_INLINE Vector<double> load(const double* from) { return load_bits<Vector<double>>(from); }
GLIMPSE_INLINE Vector<float> load(const uint8_t* from) {
  // By name, because gcc makes scalar code of a conversion from 8 to 32 bits.
#if GLIMPSE_VECTOR_BYTES == 64
  const __m512i words = _mm512_maskz_cvtepu8_epi32(0xffff, load_bits<__m128i>(from));
  return _mm512_maskz_cvtepi32_ps(0xffff, words);
#elif GLIMPSE_VECTOR_BYTES == 32
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  using Bytes = typename LaneIntegers<uint8_t>::type;
  using Words = typename LaneIntegers<int32_t>::type;
  return __builtin_convertvector(__builtin_convertvector(load_bits<Bytes>(from), Words),
                                 Vector<float>);
#endif
}
GLIMPSE_INLINE Vector<float> load(const bfloat16* from) {
  using Halves = typename LaneIntegers<uint16_t>::type;
  using Words = typename LaneIntegers<uint32_t>::type;
  return (Vector<float>)(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
}
GLIMPSE_INLINE Vector<float> load(const half* from) {
#if GLIMPSE_VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(from));
#elif GLIMPSE_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  Vector<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = load_value(from[lane]);
  return v;
#endif
}

GLIMPSE_INLINE void store(float* to, Vector<float> v) { __builtin_memcpy(to, &v, sizeof(v)); }
GLIMPSE_INLINE void store(double* to, Vector<double> v) { __builtin_memcpy(to, &v, sizeof(v)); }
GLIMPSE_INLINE void store(bfloat16* to, Vector<float> v) {
  // The lanes of Store<bfloat16>::from.
  using Words = typename LaneIntegers<uint32_t>::type;
  using Halves = typename LaneIntegers<uint16_t>::type;
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  const Words is_nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
  const Halves halves = __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}
GLIMPSE_INLINE void store(half* to, Vector<float> v) {
#if GLIMPSE_VECTOR_BYTES == 64
  const __m256i halves =
      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(to, &halves, sizeof(halves));
#elif GLIMPSE_VECTOR_BYTES == 32
  const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(to, &halves, sizeof(halves));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = Store<half>::from(v[lane]);
#endif
}

// The first `count` lanes only; the others load as zero and are not stored.

template <class T>
GLIMPSE_INLINE Vector<acc_t<T>> load_part(const T* from, int count) {
  T lanes[kLanes<acc_t<T>>] = {};
  __builtin_memcpy(lanes, from, sizeof(T) * static_cast<unsigned>(count));
  return load(lanes);
}
template <class T>
GLIMPSE_INLINE void store_part(T* to, Vector<acc_t<T>> v, int count) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  __builtin_memcpy(to, lanes, sizeof(T) * static_cast<unsigned>(count));
}
#if GLIMPSE_VECTOR_BYTES == 64
GLIMPSE_INLINE Vector<float> load_part(const float* from, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
}
GLIMPSE_INLINE void store_part(float* to, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), v);
}
GLIMPSE_INLINE Vector<double> load_part(const double* from, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), from);
}
GLIMPSE_INLINE void store_part(double* to, Vector<double> v, int count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1u), v);
}
GLIMPSE_INLINE Vector<float> load_part(const half* from, int count) {
  return _mm512_maskz_cvtph_ps(
      0xffff, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), from));
}
GLIMPSE_INLINE Vector<float> load_part(const bfloat16* from, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), from);
  return (Vector<float>)(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits),
                                                 16));
}
#elif GLIMPSE_VECTOR_BYTES == 32
GLIMPSE_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GLIMPSE_INLINE Vector<float> load_part(const float* from, int count) {
  return _mm256_maskload_ps(from, first_lanes(count));
}
GLIMPSE_INLINE void store_part(float* to, Vector<float> v, int count) {
  _mm256_maskstore_ps(to, first_lanes(count), v);
}
#endif

// Four numbers, whatever the vectors of the instruction set: the channels of a pixel.

template <class A>
struct QuadOf {
  typedef A type __attribute__((vector_size(4 * sizeof(A))));
};
template <class A>
using Quad = typename QuadOf<A>::type;

template <class A>
GLIMPSE_INLINE Quad<A> load_quad(const A* from) {
  return load_bits<Quad<A>>(from);
}
template <class A>
GLIMPSE_INLINE void store_quad(A* to, Quad<A> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}
template <class A>
GLIMPSE_INLINE Quad<A> quad_of(A value) {
  return value - Quad<A>{};
}
GLIMPSE_INLINE Quad<float> quad_multiply_add(Quad<float> a, Quad<float> b, Quad<float> c) {
#if GLIMPSE_VECTOR_BYTES > 16
  return _mm_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
GLIMPSE_INLINE Quad<double> quad_multiply_add(Quad<double> a, Quad<double> b, Quad<double> c) {
#if GLIMPSE_VECTOR_BYTES > 16
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

template <class A>
GLIMPSE_INLINE void transpose_quads(Quad<A>* rows) {
  const Quad<A> a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  const Quad<A> ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Quad<A> ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad<A> cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Quad<A> cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

/// from[index[lane]] of each lane, for indices below 2 * lanes; reads two vectors.
template <class A>
GLIMPSE_INLINE Vector<A> pick_near(const A* from, const int32_t* index) {
  Vector<A> v;
  for (int lane = 0; lane < kLanes<A>; ++lane) v[lane] = from[index[lane]];
  return v;
}
#if GLIMPSE_VECTOR_BYTES == 64
GLIMPSE_INLINE Vector<float> pick_near(const float* from, const int32_t* index) {
  return _mm512_permutex2var_ps(load(from), load_bits<__m512i>(index), load(from + 16));
}
GLIMPSE_INLINE Vector<double> pick_near(const double* from, const int32_t* index) {
  return _mm512_permutex2var_pd(
      load(from), _mm512_maskz_cvtepi32_epi64(0xff, load_bits<__m256i>(index)), load(from + 8));
}
#elif GLIMPSE_VECTOR_BYTES == 32
GLIMPSE_INLINE Vector<float> pick_near(const float* from, const int32_t* index) {
  const __m256i lanes = load_bits<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(load(from), lanes);
  const __m256 high = _mm256_permutevar8x32_ps(load(from + 8), lanes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
}
#endif

/// As pick_near, for any index.
template <class A>
GLIMPSE_INLINE Vector<A> pick_far(const A* from, const int32_t* index) {
  Vector<A> v;
  for (int lane = 0; lane < kLanes<A>; ++lane) v[lane] = from[index[lane]];
  return v;
}

// Lanes that pick out of vectors in registers: lane i takes number index[i] of its sources laid end
// to end, and is zero where bit i of the mask is not set.

/// Most vectors that a lane can pick from; 0 where the instruction set has no such permutation.
#if GLIMPSE_VECTOR_BYTES == 64
template <class A>
constexpr int kPickSources = 4;
#elif GLIMPSE_VECTOR_BYTES == 32
template <class A>
constexpr int kPickSources = sizeof(A) == sizeof(float) ? 2 : 0;
#else
template <class A>
constexpr int kPickSources = 0;
#endif

#if GLIMPSE_VECTOR_BYTES == 64
template <class A>
struct PickLanes;
template <>
struct PickLanes<float> {
  __m512i index;
  __mmask16 mask;

  GLIMPSE_MEMBER PickLanes from(const uint8_t* indices, uint16_t bits) {
    return {_mm512_maskz_cvtepu8_epi32(0xffff, load_bits<__m128i>(indices)), bits};
  }
};
template <>
struct PickLanes<double> {
  __m512i index;
  __mmask8 mask;

  GLIMPSE_MEMBER PickLanes from(const uint8_t* indices, uint16_t bits) {
    return {_mm512_maskz_cvtepu8_epi64(0xff, _mm_loadu_si64(indices)), static_cast<__mmask8>(bits)};
  }
};

template <int Sources>
GLIMPSE_INLINE Vector<float> pick(const Vector<float>* sources, const PickLanes<float>& lanes) {
  if constexpr (Sources == 1) {
    return _mm512_maskz_permutexvar_ps(lanes.mask, lanes.index, sources[0]);
  } else if constexpr (Sources == 2) {
    return _mm512_maskz_permutex2var_ps(lanes.mask, sources[0], lanes.index, sources[1]);
  } else {
    const __mmask16 high =
        _mm512_mask_test_epi32_mask(lanes.mask, lanes.index, _mm512_set1_epi32(32));
    const __m512 low =
        _mm512_maskz_permutex2var_ps(lanes.mask & ~high, sources[0], lanes.index, sources[1]);
    return _mm512_or_ps(low,
                        _mm512_maskz_permutex2var_ps(high, sources[2], lanes.index, sources[3]));
  }
}
template <int Sources>
GLIMPSE_INLINE Vector<double> pick(const Vector<double>* sources, const PickLanes<double>& lanes) {
  if constexpr (Sources == 1) {
    return _mm512_maskz_permutexvar_pd(lanes.mask, lanes.index, sources[0]);
  } else if constexpr (Sources == 2) {
    return _mm512_maskz_permutex2var_pd(lanes.mask, sources[0], lanes.index, sources[1]);
  } else {
    const __mmask8 high =
        _mm512_mask_test_epi64_mask(lanes.mask, lanes.index, _mm512_set1_epi64(16));
    const __m512d low =
        _mm512_maskz_permutex2var_pd(lanes.mask & ~high, sources[0], lanes.index, sources[1]);
    return _mm512_or_pd(low,
                        _mm512_maskz_permutex2var_pd(high, sources[2], lanes.index, sources[3]));
  }
}
#elif GLIMPSE_VECTOR_BYTES == 32
template <class A>
struct PickLanes {
  __m256i index;
  __m256 mask;

  GLIMPSE_MEMBER PickLanes from(const uint8_t* indices, uint16_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), bit);
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(indices))),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit))};
  }
};

template <int Sources>
GLIMPSE_INLINE Vector<float> pick(const Vector<float>* sources, const PickLanes<float>& lanes) {
  __m256 v = _mm256_permutevar8x32_ps(sources[0], lanes.index);
  if constexpr (Sources == 2) {
    const __m256 high = _mm256_permutevar8x32_ps(sources[1], lanes.index);
    v = _mm256_blendv_ps(v, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes.index, 28)));
  }
  return _mm256_and_ps(v, lanes.mask);
}
#else
// Named where no lane picks, but never used.
template <class A>
struct PickLanes {
  static PickLanes from(const uint8_t*, uint16_t) { return {}; }
};
template <int Sources, class A>
Vector<A> pick(const Vector<A>* sources, const PickLanes<A>& lanes);
#endif

/// Clears the lanes whose mask bits are 0. Not a product: 0 * NaN is NaN.
template <class A>
GLIMPSE_INLINE Vector<A> keep(Vector<A> v, const A* mask) {
  using Words = typename LaneIntegers<uint32_t>::type;
  return (Vector<A>)((Words)v & load_bits<Words>(mask));
}

template <class A>
GLIMPSE_INLINE Vector<A> larger_of(Vector<A> a, Vector<A> b) {
  return a > b ? a : b;
}

/// A bit for each lane: a >= b.
template <class A>
GLIMPSE_INLINE uint32_t not_less_lanes(Vector<A> a, Vector<A> b) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) bits |= uint32_t{a[lane] >= b[lane]} << lane;
  return bits;
}
GLIMPSE_INLINE uint32_t not_less(Vector<float> a, Vector<float> b) {
#if GLIMPSE_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif GLIMPSE_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#else
  return not_less_lanes<float>(a, b);
#endif
}
GLIMPSE_INLINE uint32_t not_less(Vector<double> a, Vector<double> b) {
#if GLIMPSE_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ);
#elif GLIMPSE_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GE_OQ)));
#else
  return not_less_lanes<double>(a, b);
#endif
}

template <class A>
GLIMPSE_INLINE double sum_lanes(Vector<A> v) {
  double sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += static_cast<double>(v[lane]);
  return sum;
}

// Transposes of kLanes x kLanes squares. Shuffles inside 128 bits first, then of 128-bit parts.

#if GLIMPSE_VECTOR_BYTES == 64
#define GLIMPSE_SHUFFLE_PARTS(a, b, i, j, k, l)                                                 \
  (decltype(a))__builtin_shufflevector((Vector<double>)(a), (Vector<double>)(b), 2 * (i),       \
                                       2 * (i) + 1, 2 * (j), 2 * (j) + 1, 2 * (k), 2 * (k) + 1, \
                                       2 * (l), 2 * (l) + 1)
#endif

/// Exchanges 128-bit parts: afterwards rows[g * stride] holds part g of what the inputs held.
template <class V>
GLIMPSE_INLINE void transpose_parts(V* rows, int stride) {
#if GLIMPSE_VECTOR_BYTES == 64
  const V a = rows[0], b = rows[stride], c = rows[2 * stride], d = rows[3 * stride];
  const V ab_low = GLIMPSE_SHUFFLE_PARTS(a, b, 0, 1, 4, 5);
  const V ab_high = GLIMPSE_SHUFFLE_PARTS(a, b, 2, 3, 6, 7);
  const V cd_low = GLIMPSE_SHUFFLE_PARTS(c, d, 0, 1, 4, 5);
  const V cd_high = GLIMPSE_SHUFFLE_PARTS(c, d, 2, 3, 6, 7);
  rows[0] = GLIMPSE_SHUFFLE_PARTS(ab_low, cd_low, 0, 2, 4, 6);
  rows[stride] = GLIMPSE_SHUFFLE_PARTS(ab_low, cd_low, 1, 3, 5, 7);
  rows[2 * stride] = GLIMPSE_SHUFFLE_PARTS(ab_high, cd_high, 0, 2, 4, 6);
  rows[3 * stride] = GLIMPSE_SHUFFLE_PARTS(ab_high, cd_high, 1, 3, 5, 7);
#elif GLIMPSE_VECTOR_BYTES == 32
  using Wide = Vector<double>;
  const Wide a = (Wide)rows[0], b = (Wide)rows[stride];
  rows[0] = (V)__builtin_shufflevector(a, b, 0, 1, 4, 5);
  rows[stride] = (V)__builtin_shufflevector(a, b, 2, 3, 6, 7);
#else
  (void)rows;
  (void)stride;
#endif
}

#if GLIMPSE_VECTOR_BYTES == 64
#define GLIMPSE_PAIRS(a, b, i, j, k, l)                                                           \
  __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4, (i) + 8, (j) + 8, \
                          (k) + 8, (l) + 8, (i) + 12, (j) + 12, (k) + 12, (l) + 12)
#define GLIMPSE_SINGLES(a, b, i, j) \
  __builtin_shufflevector(a, b, i, j, (i) + 2, (j) + 2, (i) + 4, (j) + 4, (i) + 6, (j) + 6)
#elif GLIMPSE_VECTOR_BYTES == 32
#define GLIMPSE_PAIRS(a, b, i, j, k, l) \
  __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4)
#define GLIMPSE_SINGLES(a, b, i, j) __builtin_shufflevector(a, b, i, j, (i) + 2, (j) + 2)
#else
#define GLIMPSE_PAIRS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define GLIMPSE_SINGLES(a, b, i, j) __builtin_shufflevector(a, b, i, j)
#endif

GLIMPSE_INLINE void transpose(Vector<float>* rows) {
  constexpr int n = kLanes<float>;
  constexpr int parts = n / 4;
  for (int g = 0; g < n; g += 4) {
    const Vector<float> a = rows[g], b = rows[g + 1], c = rows[g + 2], d = rows[g + 3];
    const Vector<float> ab_low = GLIMPSE_PAIRS(a, b, 0, n, 1, n + 1);
    const Vector<float> ab_high = GLIMPSE_PAIRS(a, b, 2, n + 2, 3, n + 3);
    const Vector<float> cd_low = GLIMPSE_PAIRS(c, d, 0, n, 1, n + 1);
    const Vector<float> cd_high = GLIMPSE_PAIRS(c, d, 2, n + 2, 3, n + 3);
    rows[g] = GLIMPSE_PAIRS(ab_low, cd_low, 0, 1, n, n + 1);
    rows[g + 1] = GLIMPSE_PAIRS(ab_low, cd_low, 2, 3, n + 2, n + 3);
    rows[g + 2] = GLIMPSE_PAIRS(ab_high, cd_high, 0, 1, n, n + 1);
    rows[g + 3] = GLIMPSE_PAIRS(ab_high, cd_high, 2, 3, n + 2, n + 3);
  }
  // Row 4 g + i holds columns i, 4 + i, ... of its four rows; wanted is column by column.
  if (parts > 1) {
    for (int i = 0; i < 4; ++i) transpose_parts(rows + i, 4);
  }
}

GLIMPSE_INLINE void transpose(Vector<double>* rows) {
  constexpr int n = kLanes<double>;
  constexpr int parts = n / 2;
  for (int g = 0; g < n; g += 2) {
    const Vector<double> a = rows[g], b = rows[g + 1];
    rows[g] = GLIMPSE_SINGLES(a, b, 0, n);
    rows[g + 1] = GLIMPSE_SINGLES(a, b, 1, n + 1);
  }
  if (parts > 1) {
    for (int i = 0; i < 2; ++i) transpose_parts(rows + i, 2);
  }
}

#undef GLIMPSE_PAIRS
#undef GLIMPSE_SINGLES
#undef GLIMPSE_SHUFFLE_PARTS
