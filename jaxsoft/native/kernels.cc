// The kernels, compiled for each instruction set, with vector types that GCC and Clang have on every platform.
// Functions of the standard library's templates must not be used here: their copy for one instruction set could be
// linked for another.
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <utility>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline)) inline
#define FORCE __attribute__((always_inline))

namespace jaxsoft::JAXSOFT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kVectors = 4;            // in a pack: a single sum would wait for its own result
constexpr int64_t kKept = 1 << 15;     // exponentials of half precision that are stored until they are scaled
constexpr int64_t kAlternate = 32;     // packs that a few positions fill, from which they are read where they are
constexpr int64_t kFetched = 1 << 18;  // bytes that fit in a second-level cache
// Rows with fewer classes are copied contiguously, and rows with more are long. Between the two they are computed four at
// a time, where vectors are so wide that few of them hold a row.
constexpr int64_t kShort = kBytes == 64 ? 48 : 256, kLong = 256;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// ---- Numbers: the dtype to compute in, its vectors, and integers of their size.

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class C>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef uint32_t U __attribute__((vector_size(kBytes)));
};
template <>
struct Vectors<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
  typedef uint64_t U __attribute__((vector_size(kBytes)));
};
using VF = Vectors<float>::V;
using VU = Vectors<float>::U;
using VI = Vectors<float>::I;
typedef uint16_t VH __attribute__((vector_size(kBytes / 2)));

template <class T>
struct Compute {
  using Type = float;
  static constexpr float kEpsilon = FLT_EPSILON;
  static constexpr float kLowest = __is_same(T, float) ? -FLT_MAX : __is_same(T, Bfloat16) ? -0x1.fep127f : -65504.f;
};
template <>
struct Compute<double> {
  using Type = double;
  static constexpr double kEpsilon = DBL_EPSILON, kLowest = -DBL_MAX;
};

// Half precision with integers gives the same result for every instruction set, and denormals survive flush-to-zero.
INLINE VF widened(VH bits, Bfloat16) { return (VF)(__builtin_convertvector(bits, VU) << 16); }
INLINE VF widened(VH bits, Float16) {
  const VU half = __builtin_convertvector(bits, VU), sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const VU normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7f800000u;
  const VU denormal = (VU)(__builtin_convertvector((VI)magnitude, VF) * 0x1p-24f);
  return (VF)(sign | (magnitude < 0x400u ? denormal : magnitude < 0x7c00u ? normal : special));
}
INLINE VH narrowed(VF x, Bfloat16) {  // to nearest, ties to even
  const VU bits = (VU)x, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u, zero = {};
  const VU half = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
  return __builtin_convertvector(sign | (magnitude > 0x7f800000u ? zero + 0x7fc0u : half), VH);
}
INLINE VH narrowed(VF x, Float16) {
  const VU bits = (VU)x, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u, zero = {};
  const VU normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const VU denormal = (VU)((VF)magnitude + 0.5f) - 0x3f000000u;
  const VU half = magnitude < 0x38800000u ? denormal : magnitude < 0x47800000u ? normal : zero + 0x7c00u;
  return __builtin_convertvector(sign | (magnitude > 0x7f800000u ? zero + 0x7e00u : half), VH);
}

template <class T>
INLINE typename Vectors<typename Compute<T>::Type>::V load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    VH bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return widened(bits, T{});
  } else {
    typename Vectors<T>::V v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
  }
}
template <class T, class V>
INLINE void store(T* to, V v) {
  if constexpr (sizeof(T) == 2) {
    const VH bits = narrowed(v, T{});
    __builtin_memcpy(to, &bits, sizeof(bits));
  } else {
    __builtin_memcpy(to, &v, sizeof(v));
  }
}
template <class T>
INLINE typename Compute<T>::Type number(T x) {
  T vector[kBytes / sizeof(typename Compute<T>::Type)] = {x};
  return load(vector)[0];
}

// The first `count` lanes; the others have any value, or are not written.
template <class T>
INLINE auto load_some(const T* from, int64_t count) {
  constexpr int lanes = kBytes / sizeof(typename Compute<T>::Type);
  if (count >= lanes) return load(from);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return (VF)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const VI lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (VF)_mm256_maskload_ps(from, (__m256i)(lane < int32_t(count)));
  }
#endif
  T buffer[lanes] = {};
  __builtin_memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}
// A size that is known at run time only, in powers of two.
template <int size, class T>
INLINE void copy_some(T* to, const T* from, int64_t count) {
  if (count & size) __builtin_memcpy(to, from, size * sizeof(T)), to += size, from += size;
  if constexpr (size > 1) copy_some<size / 2>(to, from, count);
}
template <class T, class V>
INLINE void store_some(T* to, V v, int64_t count) {
  constexpr int lanes = kBytes / sizeof(typename Compute<T>::Type);
  if (count >= lanes) return store(to, v);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)v);
#endif
  T buffer[lanes];
  store(buffer, v);
  copy_some<lanes / 2>(to, buffer, count);
}

template <class C>
using Lanes = std::make_integer_sequence<int, int(kBytes / sizeof(C))>;

// Constant lanes of a and b, or compilers would choose them at run time.
template <class C, int... index>
INLINE typename Vectors<C>::V chosen(typename Vectors<C>::V a, typename Vectors<C>::V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, typename Vectors<C>::I{index...});
#endif
}

// All lanes combined, in every lane: with those whose index differs in one bit, for each bit in turn.
template <class C, int bit = kBytes / sizeof(C) / 2, class F, int... l>
INLINE typename Vectors<C>::V combined(typename Vectors<C>::V v, F f, std::integer_sequence<int, l...> lanes) {
  if constexpr (bit == 0) {
    return v;
  } else {
    return combined<C, bit / 2>(f(v, chosen<C, (l ^ bit)...>(v, v)), f, lanes);
  }
}

template <class C, int half = kBytes / sizeof(C) / 2, int... l>
INLINE void transpose(typename Vectors<C>::V* square, std::integer_sequence<int, l...> lanes) {
  constexpr int n = kBytes / sizeof(C);
  if constexpr (half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & half) continue;
      const auto a = square[i], b = square[i + half];
      square[i] = chosen<C, (l & half ? l - half + n : l)...>(a, b);
      square[i + half] = chosen<C, (l & half ? l + n : l + half)...>(a, b);
    }
    transpose<C, half / 2>(square, lanes);
  }
}

// ---- Packs of vectors.

template <class C>
struct Pack {
  using V = typename Vectors<C>::V;
  static constexpr int kVector = kBytes / sizeof(C), kLanes = kVectors * kVector;
  V v[kVectors];

  static INLINE Pack all(C x) {
    Pack p;
    for (V& v : p.v) v = x - V{};
    return p;
  }
  // The first `count` lanes from memory, the others padding.
  template <class T>
  static INLINE Pack load(const T* from, int64_t count = kLanes, C padding = 0) {
    Pack p;
    if (count >= kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) p.v[i] = JAXSOFT_ISA::load(from + i * kVector);
      return p;
    }
    for (int i = 0; i < kVectors; ++i) p.v[i] = vector(from + i * kVector, count - i * kVector, padding);
    return p;
  }
  template <class T>
  static INLINE V vector(const T* from, int64_t count, C padding) {
    if (count >= kVector) return JAXSOFT_ISA::load(from);
    const V all = padding - V{};
    if (count <= 0) return all;
    const V loaded = load_some(from, count);
    return iota() < static_cast<decltype(iota()[0] + 0)>(count) ? loaded : all;
  }
  template <class T>
  INLINE void store(T* to, int64_t count = kLanes) const {
    for (int i = 0; i < kVectors; ++i) {
      if (count > i * kVector) store_some(to + i * kVector, v[i], count - i * kVector);
    }
  }
  static INLINE typename Vectors<C>::I iota() {
    typename Vectors<C>::I index;
    for (int l = 0; l < kVector; ++l) index[l] = l;
    return index;
  }
};

template <class C, class F, class... Packs>
INLINE Pack<C> map(F f, const Pack<C>& first, const Packs&... rest) {
  Pack<C> result;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) result.v[i] = f(first.v[i], rest.v[i]...);
  return result;
}
template <class C>
INLINE Pack<C> operator+(const Pack<C>& a, const Pack<C>& b) {
  return map([](auto x, auto y) FORCE { return x + y; }, a, b);
}
template <class C>
INLINE Pack<C> operator-(const Pack<C>& a, const Pack<C>& b) {
  return map([](auto x, auto y) FORCE { return x - y; }, a, b);
}
template <class C>
INLINE Pack<C> operator*(const Pack<C>& a, const Pack<C>& b) {
  return map([](auto x, auto y) FORCE { return x * y; }, a, b);
}
template <class C>
INLINE Pack<C> larger(const Pack<C>& a, const Pack<C>& b) {  // NaN where either is
  return map([](auto x, auto y) FORCE { return ((y > x) | (y != y)) ? y : x; }, a, b);
}
template <class V>
INLINE V weighted_vector(V weight, V cost) {  // 0 where there is no weight
  return weight == 0 ? V{} : weight * cost;
}

// ---- The exponential and the logarithm.

template <class C>
struct Exp;
template <>
struct Exp<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f, kLog2e = 0x1.715476p0f, kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -87.33654f;
  // Minimax for (exp(r) − 1 − r) / r² on |r| ≤ ln 2 / 2, within 4e-9 of exp(r).
  static constexpr float kTerms[] = {0x1.6a23cep-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f};
};
template <>
struct Exp<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52, kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2Hi = 0x1.62e42fefa38p-1, kLn2Lo = 0x1.ef35793c7673p-45;
  static constexpr double kLowest = -708.39641853226;
  static constexpr double kTerms[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                      1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                      1. / 120,        1. / 24,        1. / 6,        1. / 2};
};

// exp(x) for x ≤ 0 within about an ulp: x = n ln 2 + r. 0 where it would be below the smallest normal number.
template <class C>
INLINE typename Vectors<C>::V exp_vector(typename Vectors<C>::V x) {
  using E = Exp<C>;
  using V = typename Vectors<C>::V;
  using U = typename Vectors<C>::U;
  const auto polynomial = [](V x, V n) FORCE {
    const V r = (x - n * E::kLn2Hi) - n * E::kLn2Lo;
    V q = E::kTerms[0] - V{};
#pragma GCC unroll 16
    for (unsigned i = 1; i < sizeof(E::kTerms) / sizeof(C); ++i) q = q * r + E::kTerms[i];
    return 1 + (r + r * r * q);
  };
#ifdef __AVX512F__
  if constexpr (sizeof(C) == 4) {  // rounds and scales in one instruction each, and keeps NaN
    x = (V)_mm512_max_ps(_mm512_set1_ps(-104.f), (__m512)x);
    const V n = (V)_mm512_roundscale_ps((__m512)(x * E::kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (V)_mm512_scalef_ps((__m512)polynomial(x, n), (__m512)n);
  }
#endif
  const V rounded = x * E::kLog2e + E::kRound, n = rounded - E::kRound;  // the last bits contain n too
  const V power = (V)(((U)rounded << E::kMantissa) + (static_cast<decltype(U{}[0] + 0)>(E::kBias) << E::kMantissa));
  return x < E::kLowest ? V{} : polynomial(x, n) * power;  // a multiplication keeps NaN
}
template <class C>
INLINE Pack<C> exponential(const Pack<C>& p) {
  return map([](auto x) FORCE { return exp_vector<C>(x); }, p);
}

INLINE VF log_vector(VF x) {  // of normal numbers, by S. L. Moshier's polynomial (Cephes)
  constexpr float kTerms[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                              -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const VI exponent = ((VI)x - 0x3f3504f3) >> 23;  // the mantissa is between the roots of ½ and 2
  const VF e = __builtin_convertvector(exponent, VF), f = (VF)((VI)x - (exponent << 23)) - 1, square = f * f;
  VF q = kTerms[0] - VF{};
#pragma GCC unroll 16
  for (int i = 1; i < 9; ++i) q = q * f + kTerms[i];
  const VF log = (f + (q * f * square - e * 2.12194440e-4f - square / 2)) + e * 0.693359375f;
  return x <= FLT_MAX ? log : x;
}
INLINE Vectors<double>::V log_vector(Vectors<double>::V x) {
  for (unsigned l = 0; l < kBytes / sizeof(double); ++l) x[l] = log(x[l]);
  return x;
}
template <class V>
INLINE V log1p_vector(V x) {  // of x ≥ 0, with W. Kahan's correction
  const V u = 1 + x, log = log_vector(u) + (x - (u - 1)) / u;
  return u - u == 0 ? log : x;
}

// ---- Layouts: how the numbers of some positions are packed. A step is a pack of classes, or the class of a pack.

template <class T>
struct Base {
  using C = typename Compute<T>::Type;
  using P = Pack<C>;
  static constexpr int64_t kLanes = P::kLanes;
  // Until their sum is known, exponentials are stored in the result's memory, or in scratch for half precision.
  static constexpr bool kInResult = sizeof(T) == sizeof(C);
  const Call& call;
  C* scratch;
  int64_t classes = call.shape.classes, inner = call.shape.inner;
};

template <class T>
struct Rows : Base<T> {
  using typename Base<T>::C;
  using typename Base<T>::P;
  using Base<T>::kLanes;
  static constexpr bool kOneRow = true, kRowEach = true;
  int64_t row = 0;

  static int64_t units(const Shape& shape) { return shape.outer; }
  static int64_t scratch_size(const Shape& shape) {
    return sizeof(T) == 2 && shape.classes <= kKept ? shape.classes + kLanes : 0;
  }
  INLINE void locate(int64_t unit) { row = unit; }
  INLINE int64_t steps() const { return ceil_div(this->classes, kLanes); }
  INLINE int64_t count(int64_t step) const { return this->classes - step * kLanes; }
  template <class U>
  INLINE P read(const U* array, int64_t step, C padding) const {
    return P::load(array + row * this->classes + step * kLanes, count(step), padding);
  }
  INLINE void write(int64_t step, const P& p) const {
    p.store(static_cast<T*>(this->call.result) + row * this->classes + step * kLanes, count(step));
  }
  INLINE P weights(int64_t step) const {
    const Call& call = this->call;
    const C* from = static_cast<const C*>(call.weights);
    if (call.weight_rows == 0) return read(from, step, 0);
    const int64_t shared = row / (call.shape.outer / call.weight_rows);
    return P::load(from + shared * this->classes + step * kLanes, count(step));
  }
  template <class U>
  INLINE P get(const U* array) const {
    return P::all(array[row]);
  }
  template <class U>
  INLINE void put(U* array, const P& p) const {
    array[row] = static_cast<U>(p.v[0][0]);
  }
  INLINE C* kept_wide(int64_t step) const { return this->scratch + step * kLanes; }
  // Class indices of a step, and labels, to compare with each other.
  struct Labels {
    int64_t label;
  };
  INLINE Labels labels() const { return {this->call.label[row]}; }
  INLINE P where_label(int64_t step, Labels l, const P& at_label, const P& elsewhere) const {
    P result = elsewhere;
    const int64_t lane = l.label - step * kLanes;
    if (lane < 0 || lane >= kLanes) return result;
    const auto iota = P::iota();
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const auto own = static_cast<decltype(iota[0] + 0)>(lane - i * P::kVector);
      result.v[i] = iota == own ? at_label.v[i] : elsewhere.v[i];
    }
    return result;
  }
  INLINE P index(int64_t step) const {
    P p;
    for (int i = 0; i < kVectors; ++i) {
      p.v[i] = __builtin_convertvector(P::iota(), typename P::V) + C(step * kLanes + i * P::kVector);
    }
    return p;
  }
  INLINE P label_logit() const {
    const int64_t label = this->call.label[row], c = label < 0 ? 0 : smaller(label, this->classes - 1);
    return P::all(number(static_cast<const T*>(this->call.logits)[row * this->classes + c]));
  }
  INLINE void finish() const {}
  template <class F>
  static INLINE P fold(const P& p, F f) {  // all lanes combined, in every lane
    const auto v = combined<C>(f(f(p.v[0], p.v[1]), f(p.v[2], p.v[3])), f, Lanes<C>{});
    P result;
    for (auto& each : result.v) each = v;
    return result;
  }
};

// Short rows, each in its own vector: while one waits for its result, the others are computed.
template <class T>
struct Quads : Base<T> {
  using typename Base<T>::C;
  using typename Base<T>::P;
  static constexpr bool kOneRow = false, kRowEach = true;
  static constexpr int kVector = P::kVector;
  int64_t first = 0, rows = 0;

  static int64_t units(const Shape& shape) { return ceil_div(shape.outer, kVectors); }
  static int64_t scratch_size(const Shape& shape) {
    return sizeof(T) == 2 ? ceil_div(shape.classes, kVector) * P::kLanes : 0;
  }
  INLINE void locate(int64_t unit) {
    first = unit * kVectors;
    rows = smaller(kVectors, this->call.shape.outer - first);
  }
  INLINE int64_t row(int i) const { return first + smaller(i, rows - 1); }
  INLINE int64_t steps() const { return ceil_div(this->classes, kVector); }
  INLINE int64_t count(int64_t step) const { return this->classes - step * kVector; }
  template <class U>
  INLINE P read(const U* array, int64_t step, C padding) const {
    P p;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      p.v[i] = P::vector(array + row(i) * this->classes + step * kVector, count(step), padding);
    }
    return p;
  }
  INLINE void write(int64_t step, const P& p) const {
    T* result = static_cast<T*>(this->call.result) + step * kVector;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      if (i < rows) store_some(result + (first + i) * this->classes, p.v[i], count(step));
    }
  }
  INLINE P weights(int64_t step) const {
    const Call& call = this->call;
    const C* from = static_cast<const C*>(call.weights);
    if (call.weight_rows == 0) return read(from, step, 0);
    P p;
    for (int i = 0; i < kVectors; ++i) {
      const int64_t shared = row(i) / (call.shape.outer / call.weight_rows);
      p.v[i] = P::vector(from + shared * this->classes + step * kVector, count(step), 0);
    }
    return p;
  }
  template <class U>
  INLINE P get(const U* array) const {
    P p;
    for (int i = 0; i < kVectors; ++i) p.v[i] = C(array[row(i)]) - typename P::V{};
    return p;
  }
  template <class U>
  INLINE void put(U* array, const P& p) const {
    for (int64_t i = 0; i < rows; ++i) array[first + i] = static_cast<U>(p.v[i][0]);
  }
  INLINE C* kept_wide(int64_t step) const { return this->scratch + step * P::kLanes; }
  struct Labels {
    int64_t label[kVectors];
  };
  INLINE Labels labels() const {
    Labels labels;
    for (int i = 0; i < kVectors; ++i) labels.label[i] = this->call.label[row(i)];
    return labels;
  }
  INLINE P where_label(int64_t step, const Labels& l, const P& at_label, const P& elsewhere) const {
    P result;
    const auto iota = P::iota();
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const auto own = static_cast<decltype(iota[0] + 0)>(l.label[i] - step * kVector);
      result.v[i] = iota == own ? at_label.v[i] : elsewhere.v[i];
    }
    return result;
  }
  INLINE P index(int64_t step) const {
    P p;
    for (auto& v : p.v) v = __builtin_convertvector(P::iota(), typename P::V) + C(step * kVector);
    return p;
  }
  INLINE P label_logit() const {
    P p;
    for (int i = 0; i < kVectors; ++i) {
      const int64_t label = this->call.label[row(i)], c = label < 0 ? 0 : smaller(label, this->classes - 1);
      p.v[i] = number(static_cast<const T*>(this->call.logits)[row(i) * this->classes + c]) - typename P::V{};
    }
    return p;
  }
  INLINE void finish() const {}
  template <class F>
  static INLINE P fold(P p, F f) {
#pragma GCC unroll 4
    for (auto& v : p.v) v = combined<C>(v, f, Lanes<C>{});
    return p;
  }
};

// Few positions whose classes alternate in memory: a step is as many classes as fit, and lane l belongs to the position
// l % inner.
template <class T>
struct Interleaved : Base<T> {
  using typename Base<T>::C;
  using typename Base<T>::P;
  using Base<T>::kLanes;
  static constexpr bool kOneRow = false, kRowEach = false;
  int64_t first = 0, at_once = kLanes / this->inner;

  static int64_t units(const Shape& shape) { return shape.outer; }
  static int64_t scratch_size(const Shape& shape) {
    const int64_t size = ceil_div(shape.classes, kLanes / shape.inner) * kLanes;
    return sizeof(T) == 2 && size <= kKept ? size : 0;
  }
  INLINE void locate(int64_t unit) { first = unit * this->inner; }
  INLINE int64_t steps() const { return ceil_div(this->classes, at_once); }
  INLINE int64_t count(int64_t step) const { return smaller(at_once, this->classes - step * at_once) * this->inner; }
  INLINE int64_t offset(int64_t step) const { return first * this->classes + step * at_once * this->inner; }
  template <class F>
  INLINE P lanes(F number) const {
    C numbers[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) numbers[l] = number(l / this->inner, l % this->inner);
    return P::load(numbers);
  }
  template <class U>
  INLINE P read(const U* array, int64_t step, C padding) const {
    return P::load(array + offset(step), count(step), padding);
  }
  INLINE void write(int64_t step, const P& p) const {
    p.store(static_cast<T*>(this->call.result) + offset(step), count(step));
  }
  INLINE P weights(int64_t step) const {
    const Call& call = this->call;
    const C* from = static_cast<const C*>(call.weights);
    if (call.weight_rows == 0) return read(from, step, 0);
    const int64_t shared = first / this->inner / (call.shape.outer / call.weight_rows);
    from += shared * this->classes + step * at_once;
    return lanes([&](int64_t c, int64_t) FORCE { return step * at_once + c < this->classes ? from[c] : 0; });
  }
  template <class U>
  INLINE P get(const U* array) const {
    return lanes([&](int64_t, int64_t i) FORCE { return C(array[first + i]); });
  }
  template <class U>
  INLINE void put(U* array, const P& p) const {
    for (int64_t l = 0; l < this->inner; ++l) array[first + l] = static_cast<U>(p.v[l / P::kVector][l % P::kVector]);
  }
  INLINE C* kept_wide(int64_t step) const { return this->scratch + step * kLanes; }
  // A label counts from the lane's own class.
  struct Labels {
    typename Vectors<C>::I v[kVectors];
  };
  INLINE Labels labels() const {
    Labels labels;
    for (int64_t l = 0; l < kLanes; ++l) {
      labels.v[l / P::kVector][l % P::kVector] = this->call.label[first + l % this->inner] - l / this->inner;
    }
    return labels;
  }
  INLINE P where_label(int64_t step, const Labels& l, const P& at_label, const P& elsewhere) const {
    P result;
    const auto c = static_cast<decltype(l.v[0][0] + 0)>(step * at_once);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) result.v[i] = l.v[i] == c ? at_label.v[i] : elsewhere.v[i];
    return result;
  }
  INLINE P index(int64_t step) const {
    return lanes([&](int64_t c, int64_t) FORCE { return C(step * at_once + c); });
  }
  INLINE P label_logit() const {
    const T* logits = static_cast<const T*>(this->call.logits) + offset(0);
    return lanes([&](int64_t, int64_t i) FORCE {
      const int64_t label = this->call.label[first + i], c = label < 0 ? 0 : smaller(label, this->classes - 1);
      return number(logits[c * this->inner + i]);
    });
  }
  INLINE void finish() const {}
  template <class F>
  INLINE P fold(const P& p, F f) const {
    C sums[kLanes];
    p.store(sums);
    for (int64_t l = this->inner; l < at_once * this->inner; ++l) {
      sums[l % this->inner] = f(sums[l % this->inner], sums[l]);
    }
    return lanes([&](int64_t, int64_t i) FORCE { return sums[i]; });
  }
};

// Lanes are positions whose index goes on from `first`.
template <class T>
struct Across : Base<T> {
  using typename Base<T>::C;
  using typename Base<T>::P;
  using Base<T>::kLanes;
  static constexpr bool kOneRow = false, kRowEach = false;
  int64_t first = 0, lanes = 0;

  INLINE int64_t steps() const { return this->classes; }
  template <class U>
  INLINE P get(const U* array) const {
    if constexpr (__is_same(U, C)) {
      return P::load(array + first, lanes);
    } else {
      P p = P::all(0);
      for (int64_t l = 0; l < lanes; ++l) p.v[l / P::kVector][l % P::kVector] = C(array[first + l]);
      return p;
    }
  }
  template <class U>
  INLINE void put(U* array, const P& p) const {
    if constexpr (__is_same(U, C)) {
      p.store(array + first, lanes);
    } else {
      for (int64_t l = 0; l < lanes; ++l) array[first + l] = static_cast<U>(p.v[l / P::kVector][l % P::kVector]);
    }
  }
  struct Labels {
    typename Vectors<C>::I v[kVectors];
  };
  INLINE Labels labels() const {
    Labels labels;
    for (int64_t l = 0; l < kLanes; ++l) {
      labels.v[l / P::kVector][l % P::kVector] = l < lanes ? this->call.label[first + l] : -1;
    }
    return labels;
  }
  INLINE P where_label(int64_t step, const Labels& l, const P& at_label, const P& elsewhere) const {
    P result;
    const auto c = static_cast<decltype(l.v[0][0] + 0)>(step);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) result.v[i] = l.v[i] == c ? at_label.v[i] : elsewhere.v[i];
    return result;
  }
  INLINE P index(int64_t step) const { return P::all(C(step)); }
  INLINE int64_t clamped_label(int64_t lane) const {
    const int64_t label = this->call.label[first + lane];
    return label < 0 ? 0 : smaller(label, this->classes - 1);
  }
  template <class F>
  static INLINE P fold(const P& p, F) {
    return p;
  }
};

template <class T>
struct Strips : Across<T> {
  using typename Base<T>::C;
  using typename Base<T>::P;
  using Base<T>::kLanes;
  static constexpr bool kInResult = false;
  int64_t start = 0, outer = 0;
  bool fetched = false;

  static int64_t units(const Shape& shape) { return shape.outer * ceil_div(shape.inner, kLanes); }
  static int64_t scratch_size(const Shape& shape) {
    return shape.classes * kLanes <= kKept ? shape.classes * kLanes : 0;
  }
  INLINE void locate(int64_t unit) {
    const int64_t strips = ceil_div(this->inner, kLanes), strip = unit % strips, i = strip * kLanes;
    outer = unit / strips;
    this->lanes = smaller(kLanes, this->inner - i);
    this->first = outer * this->inner + i;
    start = outer * this->classes * this->inner + i;
    // Classes are far apart, and processors do not predict the next address, so several strips are fetched together.
    const int64_t together = smaller(8, 1 + kFetched / (this->classes * kLanes * int64_t(sizeof(T))));
    if (strip % together != 0 && fetched) return;
    fetched = true;
    const Call& call = this->call;
    const int64_t count = smaller(together * kLanes, this->inner - i);
    fetch<0>(static_cast<const T*>(call.logits), count);
    if (call.cotangent) fetch<0>(static_cast<const T*>(call.cotangent), count);
    if (call.result) fetch<1>(static_cast<const T*>(call.result), count);
  }
  template <int writing>
  INLINE void fetch(const T* array, int64_t count) const {
    for (int64_t c = 0; c < this->classes; ++c) {
      const char* from = reinterpret_cast<const char*>(array + start + c * this->inner);
      for (int64_t b = 0; b < count * int64_t(sizeof(T)); b += 64) __builtin_prefetch(from + b, writing, 2);
    }
  }
  template <class U>
  INLINE P read(const U* array, int64_t step, C padding) const {
    return P::load(array + start + step * this->inner, this->lanes, padding);
  }
  INLINE void write(int64_t step, const P& p) const { p.store(kept(step), this->lanes); }
  INLINE P weights(int64_t step) const {
    const Call& call = this->call;
    const C* from = static_cast<const C*>(call.weights);
    if (call.weight_rows == 0) return read(from, step, 0);
    return P::all(from[outer / (call.shape.outer / call.weight_rows) * this->classes + step]);
  }
  INLINE T* kept(int64_t step) const { return static_cast<T*>(this->call.result) + start + step * this->inner; }
  INLINE C* kept_wide(int64_t step) const { return this->scratch + step * kLanes; }
  INLINE P label_logit() const {
    const T* logits = static_cast<const T*>(this->call.logits) + start;
    P p = P::all(0);
    for (int64_t l = 0; l < this->lanes; ++l) {
      p.v[l / P::kVector][l % P::kVector] = number(logits[this->clamped_label(l) * this->inner + l]);
    }
    return p;
  }
  INLINE void finish() const {}
};

// Copies with a step's lanes contiguous: of the logits, of the other arrays that are read, and of the result.
template <class T>
struct Gathered : Across<T> {
  using typename Base<T>::C;
  using typename Base<T>::P;
  using Base<T>::kLanes;
  static constexpr bool kInResult = true;

  static int64_t units(const Shape& shape) { return ceil_div(shape.outer * shape.inner, kLanes); }
  static int64_t scratch_size(const Shape& shape) { return 2 * shape.classes * kLanes; }
  INLINE void locate(int64_t unit) {
    const Call& call = this->call;
    this->first = unit * kLanes;
    this->lanes = smaller(kLanes, call.shape.outer * this->inner - this->first);
    const bool probs = call.op == Op::kSoftmaxVjp || call.op == Op::kTotal;
    copy(static_cast<const T*>(call.logits), this->scratch, probs ? C(0) : C(-INFINITY));
    if (call.cotangent) copy(static_cast<const T*>(call.cotangent), other(0), C(0));
    if (!call.weights) return;
    const C* from = static_cast<const C*>(call.weights);
    if (call.weight_rows == 0) return copy(from, other(0), C(0));
    const int64_t sharing = call.shape.outer / call.weight_rows;
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t outer = (this->first + smaller(l, this->lanes - 1)) / this->inner;
      for (int64_t c = 0; c < this->classes; ++c) other(c)[l] = from[outer / sharing * this->classes + c];
    }
  }
  INLINE C* other(int64_t step) const { return this->scratch + (this->classes + step) * kLanes; }
  INLINE int64_t offset(int64_t lane) const {
    const int64_t position = this->first + lane;
    return position / this->inner * this->classes * this->inner + position % this->inner;
  }
  template <class U>
  void copy(const U* from, C* to, C padding) const {
    if (this->inner == 1 && this->lanes == kLanes) return transposed(from + this->first * this->classes, to);
    for (int64_t l = 0; l < this->lanes; ++l) {
      const U* one = from + offset(l);
      for (int64_t c = 0; c < this->classes; ++c) to[c * kLanes + l] = scalar(one[c * this->inner]);
    }
    for (int64_t l = this->lanes; l < kLanes; ++l) {
      for (int64_t c = 0; c < this->classes; ++c) to[c * kLanes + l] = padding;
    }
  }
  // Of rows, a square of numbers at a time. The last square overlaps the one before, unless there are fewer classes.
  template <class U>
  void transposed(const U* from, C* to) const {
    constexpr int n = P::kVector;
    for (int64_t l = 0; l < kLanes; l += n) {
      const U* rows = from + l * this->classes;
      if (this->classes < n) {
        copy_square<false>(rows, this->classes, to + l, kLanes, n, this->classes);
        continue;
      }
      for (int64_t next = 0; next < this->classes; next += n) {
        const int64_t c = smaller(next, this->classes - n);
        copy_square<true>(rows + c, this->classes, to + c * kLanes + l, kLanes, n, n);
      }
    }
  }
  void transposed_back(const C* from, T* to) const {
    constexpr int n = P::kVector;
    for (int64_t l = 0; l < kLanes; l += n) {
      T* rows = to + l * this->classes;
      if (this->classes < n) {
        copy_square<false>(from + l, kLanes, rows, this->classes, this->classes, n);
        continue;
      }
      for (int64_t next = 0; next < this->classes; next += n) {
        const int64_t c = smaller(next, this->classes - n);
        copy_square<true>(from + c * kLanes + l, kLanes, rows + c, this->classes, n, n);
      }
    }
  }
  // The transpose of `rows` rows of `columns` numbers, both n if the square is whole.
  template <bool kWhole, class A, class B>
  static INLINE void copy_square(const A* from, int64_t stride, B* to, int64_t to_stride, int64_t rows, int64_t columns) {
    constexpr int n = P::kVector;
    typename P::V square[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if constexpr (kWhole) square[i] = JAXSOFT_ISA::load(from + i * stride);
      else square[i] = i < rows ? load_some(from + i * stride, columns) : typename P::V{};
    }
    transpose<C>(square, Lanes<C>{});
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if constexpr (kWhole) JAXSOFT_ISA::store(to + i * to_stride, square[i]);
      else if (i < columns) store_some(to + i * to_stride, square[i], rows);
    }
  }
  template <class U>
  static INLINE C scalar(U x) {
    if constexpr (sizeof(U) == 2) {
      return number(x);
    } else {
      return x;
    }
  }
  template <class U>
  INLINE P read(const U* array, int64_t step, C) const {
    return P::load(static_cast<const void*>(array) == this->call.logits ? this->scratch + step * kLanes : other(step));
  }
  INLINE void write(int64_t step, const P& p) const { p.store(this->scratch + step * kLanes); }
  INLINE P weights(int64_t step) const { return P::load(other(step)); }
  INLINE C* kept(int64_t step) const { return this->scratch + step * kLanes; }
  INLINE C* kept_wide(int64_t step) const { return kept(step); }
  INLINE P label_logit() const {
    P p = P::all(0);
    for (int64_t l = 0; l < this->lanes; ++l) {
      p.v[l / P::kVector][l % P::kVector] = this->scratch[this->clamped_label(l) * kLanes + l];
    }
    return p;
  }
  INLINE void finish() const {
    T* result = static_cast<T*>(this->call.result);
    if (this->inner == 1 && this->lanes == kLanes) {
      return transposed_back(this->scratch, result + this->first * this->classes);
    }
    for (int64_t l = 0; l < this->lanes; ++l) {
      T* to = result + offset(l);
      for (int64_t c = 0; c < this->classes; ++c) {
        if constexpr (sizeof(T) == 2) {
          T vector[P::kVector];
          JAXSOFT_ISA::store(vector, this->scratch[c * kLanes + l] - typename P::V{});
          to[c * this->inner] = vector[0];
        } else {
          to[c * this->inner] = this->scratch[c * kLanes + l];
        }
      }
    }
  }
};

// ---- The computations for the positions of one unit.

template <class T, template <class> class Layout>
struct Unit : Layout<T> {
  using C = typename Compute<T>::Type;
  using P = Pack<C>;
  static constexpr C kTiny = Compute<T>::kEpsilon / 8;
  static constexpr bool kInResult = Layout<T>::kInResult;

  INLINE P logits(int64_t step) const { return this->read(static_cast<const T*>(this->call.logits), step, C(-INFINITY)); }
  INLINE P probs(int64_t step) const { return this->read(static_cast<const T*>(this->call.logits), step, C(0)); }
  INLINE P cotangent(int64_t step) const { return this->read(static_cast<const T*>(this->call.cotangent), step, C(0)); }
  INLINE P of_position(const void* array, C otherwise = 0) const {
    return array ? this->get(static_cast<const C*>(array)) : P::all(otherwise);
  }
  INLINE void report(void* array, const P& p) const {
    if (array) this->put(static_cast<C*>(array), p);
  }

  INLINE P max() const {
    P m = P::all(Compute<T>::kLowest);
    for (int64_t s = 0; s < this->steps(); ++s) m = larger(m, logits(s));
    m = this->fold(m, [](auto x, auto y) FORCE { return ((y > x) | (y != y)) ? y : x; });
    return m + P::all(0);  // flushes denormals to zero if the processor is set to flush
  }
  // Sums of 64 terms are summed 64 at a time in turn, so that the rounding error of long sums stays small.
  template <class F>
  INLINE auto sum(F term) const {
    using Terms = decltype(term(int64_t{}));
    Terms total{};
    for (int64_t s = 0; s < this->steps();) {
      Terms block{};
      for (const int64_t last = smaller(s + 4096, this->steps()); s < last;) {
        Terms part{};
        for (const int64_t end = smaller(s + 64, last); s < end; ++s) part = part + term(s);
        block = block + part;
      }
      total = total + block;
    }
    return folded(total);
  }
  INLINE P folded(const P& total) const {
    return this->fold(total, [](auto x, auto y) FORCE { return x + y; });
  }
  // Several sums in one pass.
  template <class A, class B = A>
  struct Both {
    A first;
    B second;
    friend INLINE Both operator+(const Both& a, const Both& b) { return {a.first + b.first, a.second + b.second}; }
  };
  using Two = Both<P>;
  template <class A, class B>
  INLINE Both<A, B> folded(const Both<A, B>& total) const {
    return {folded(total.first), folded(total.second)};
  }
  template <class F>
  INLINE void each(F result) const {
    for (int64_t s = 0; s < this->steps(); ++s) this->write(s, result(s));
  }

  INLINE void keep(int64_t step, const P& p) const {
    if constexpr (kInResult) {
      this->write(step, p);
    } else if (this->scratch) {
      p.store(this->kept_wide(step));
    }
  }
  INLINE P kept_exponential(int64_t step, const P& m) const {
    if constexpr (__is_same(Layout<T>, Gathered<T>)) {
      return P::load(this->kept(step));
    } else if constexpr (kInResult) {
      return this->read(static_cast<const T*>(this->call.result), step, C(0));
    } else {
      return this->scratch ? P::load(this->kept_wide(step)) : exponential(logits(step) - m);
    }
  }

  // A function of numbers per position. A row's numbers, the same in all lanes, are computed in one vector.
  template <class F, class... Packs>
  INLINE P once(F f, const Packs&... packs) const {
    if constexpr (!Layout<T>::kOneRow) return map(f, packs...);
    const auto v = f(packs.v[0]...);
    P result;
    for (auto& each : result.v) each = v;
    return result;
  }

  // Whether of any position. Lanes that are positions are too many to ask.
  static INLINE bool any_below(C bound, const P& p) {
    bool any = !Layout<T>::kRowEach;
    for (const auto& v : p.v) any |= v[0] < bound;
    return any;
  }

  void softmax() const {
    const P m = max();
    const P total = sum([&](int64_t s) FORCE {
      const P e = exponential(logits(s) - m);
      keep(s, e);
      return e;
    });
    const P scale = once([](auto total) FORCE { return 1 / (total + kTiny); }, total);
    each([&](int64_t s) FORCE { return kept_exponential(s, m) * scale; });
  }
  void log_softmax() const {
    const P m = max();
    const P total = sum([&](int64_t s) FORCE { return exponential(logits(s) - m); }) + P::all(kTiny);
    report(this->call.max_out, m), report(this->call.sum_out, total);
    const P log = once([](auto total) FORCE { return log_vector(total); }, total);
    each([&](int64_t s) FORCE { return (logits(s) - m) - log; });
  }
  // s (g − s·g), where s·g is subtracted twice. At a class whose s rounds to 1 the first difference is 0 or mere rounding.
  // The second s·g is a sum over the other classes, plus that rounding, which it restores. It is not subtracted if s does
  // not sum to 1 up to the rounding of these sums, and never in half precision, where s is rounded much more.
  void softmax_vjp() const {
    if constexpr (sizeof(T) == 2) {
      const P dot = sum([&](int64_t s) FORCE { return probs(s) * cotangent(s); });
      return each([&](int64_t s) FORCE { return probs(s) * (cotangent(s) - dot); });
    } else {
      const Two sums = sum([&](int64_t s) FORCE { return Two{probs(s) * cotangent(s), probs(s)}; });
      const P &dot = sums.first, &total = sums.second;
      const P again = sum([&](int64_t s) FORCE { return probs(s) * (cotangent(s) - dot); });
      const P rest = once([](auto total, auto again) FORCE {
        const auto excess = total - 1;
        constexpr C kLeast = 8 * Compute<T>::kEpsilon;
        return (excess < kLeast) & (excess > -kLeast) ? again : decltype(again){};
      }, total, again);
      each([&](int64_t s) FORCE { return probs(s) * ((cotangent(s) - dot) - rest); });
    }
  }
  // g − p Σ g, likewise if a class is more likely than all others together.
  void log_softmax_vjp() const {
    const P m = of_position(this->call.max), total = of_position(this->call.total);
    const auto over = [](auto x, auto total) FORCE { return x / total; };
    const P factor = once(over, sum([&](int64_t s) FORCE { return cotangent(s); }), total);
    const auto e = [&](int64_t s) FORCE { return exponential(logits(s) - m); };
    if (!any_below(2, total)) return each([&](int64_t s) FORCE { return cotangent(s) - e(s) * factor; });
    const P again = sum([&](int64_t s) FORCE {
      const P exponential = e(s);
      keep(s, exponential);
      return cotangent(s) - exponential * factor;
    });
    const P rest = once(over, again, total);
    each([&](int64_t s) FORCE {
      const P e = kept_exponential(s, m);
      return (cotangent(s) - e * factor) - e * rest;
    });
  }

  // The sum over all classes except the label, the label's logit, and Σ q, Σ q (m − z). For a distribution one class
  // with logit m takes the label's place, and Σ q over the classes with logits below m is computed too.
  struct Sums {
    P m, others, label_logit, weight_sum, gap, other_weight;
    typename Layout<T>::Labels labels;
  };
  template <bool kLabel, bool kWeights, bool kKeeps>
  INLINE Sums sums() const {
    Sums found;
    const P m = found.m = max();
    if constexpr (kLabel) found.labels = this->labels(), found.label_logit = this->label_logit();
    const auto below = [&](int64_t s) FORCE { return logits(s) - m; };
    const auto unless_lead = [](const P& p, const P& below) FORCE {
      return map([](auto p, auto x) FORCE { return x == 0 ? decltype(p){} : p; }, p, below);
    };
    const auto gap = [](const P& weights, const P& below) FORCE {
      return map([](auto w, auto x) FORCE { return weighted_vector(w, -x); }, weights, below);
    };
    // Exponentials come last, since of a copy what is kept takes the place of the logits.
    if constexpr (kWeights && !kLabel) {
      const Both<Two, P> weights = sum([&](int64_t s) FORCE {
        const P x = below(s), w = this->weights(s);
        return Both<Two, P>{{w, unless_lead(w, x)}, gap(w, x)};
      });
      found.weight_sum = weights.first.first, found.other_weight = weights.first.second, found.gap = weights.second;
      const Two exponentials = sum([&](int64_t s) FORCE {
        const P x = below(s), e = exponential(x);
        if constexpr (kKeeps) keep(s, e);
        return Two{e, unless_lead(e, x)};
      });
      const P& all = exponentials.first;
      // From 2 on one of the ones that leading classes add can be subtracted without a loss.
      found.others = map([](auto all, auto below) FORCE { return all < 2 ? below : all - 1; }, all, exponentials.second);
      found.label_logit = map([](auto all, auto m) FORCE { return all > 0 ? m : C(-INFINITY) - decltype(m){}; }, all, m);
    } else {
      if constexpr (kWeights) {
        const Two weights = sum([&](int64_t s) FORCE {
          const P w = this->weights(s);
          return Two{w, gap(w, below(s))};
        });
        found.weight_sum = weights.first, found.gap = weights.second;
      }
      found.others = sum([&](int64_t s) FORCE {
        const P e = exponential(below(s));
        if constexpr (kKeeps) keep(s, e);
        if constexpr (kLabel) return this->where_label(s, found.labels, P::all(0), e);
        else return e;
      });
    }
    return found;
  }
  INLINE P logits_or_0(int64_t step) const {  // padding has no weight
    return this->read(static_cast<const T*>(this->call.logits), step, C(0));
  }

  template <bool kLabel, bool kWeights>
  void statistics() const {
    const Sums found = sums<kLabel, kWeights, false>();
    report(this->call.max_out, found.m), report(this->call.sum_out, found.others);
    if constexpr (kLabel || kWeights) report(this->call.label_out, found.label_logit);
    if constexpr (kWeights) report(this->call.weight_sum_out, found.weight_sum), report(this->call.gap_out, found.gap);
    if constexpr (kWeights && !kLabel) report(this->call.other_weight_out, found.other_weight);
  }

  void moments() const {  // the classes with the largest logit are counted, which is exact, not summed
    const P m = max();
    P count = P::all(0), leader = P::all(C(this->classes));
    const P none = leader;
    for (int64_t s = 0; s < this->steps(); ++s) {
      const P x = logits(s), index = this->index(s);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const auto leads = x.v[i] == m.v[i];
        const auto zero = typename P::V{};
        count.v[i] += leads ? zero + 1 : zero;
        const auto own = leads ? index.v[i] : none.v[i];
        leader.v[i] = own < leader.v[i] ? own : leader.v[i];
      }
    }
    count = this->fold(count, [](auto x, auto y) FORCE { return x + y; });
    leader = this->fold(leader, [](auto x, auto y) FORCE { return x < y ? x : y; });
    const auto below = [&](int64_t s) FORCE { return m - logits(s); };
    const auto without_leaders = [](auto b) FORCE {
      const auto e = exp_vector<C>(-b);
      return b == 0 ? b - b : e;
    };
    const P others = sum([&](int64_t s) FORCE { return map(without_leaders, below(s)); });
    const P gap = sum([&](int64_t s) FORCE {
      return map([&](auto b) FORCE {
        const auto e = without_leaders(b);
        return e == 0 ? typename P::V{} : e * b;
      }, below(s));
    });
    const auto any = [](auto n, auto x, auto otherwise) FORCE { return n > 0 ? x : otherwise; };
    report(this->call.max_out, m), report(this->call.gap_out, gap);
    report(this->call.sum_out, others + map(any, count, count - P::all(1), P::all(0)));
    report(this->call.label_out, map(any, count, m, P::all(C(-INFINITY))));
    this->put(this->call.leader_out, leader);
  }

  // Numbers per position of a gradient, see scaled_exponentials in statistics.py.
  struct Gradient {
    P factor, at_label, share, ignored, max_constant, max_slope;
  };
  // exp(z − m)·factor − share·q, with `at_label` as the first term at the label, and 0 where ignored. With kLead
  // max_constant − max_slope·q where the exponential is 1.
  template <bool kLabel, bool kWeights, bool kLead, class F>
  INLINE void write_gradient(F exponential_at, const Gradient& of) const {
    const auto labels = this->labels_if(kLabel);
    each([&](int64_t s) FORCE {
      const P e = exponential_at(s);
      P g = e * of.factor;
      if constexpr (kLabel) g = this->where_label(s, labels, of.at_label, g);
      if constexpr (kWeights) {
        const P q = this->weights(s);
        g = g - of.share * q;
        if constexpr (kLead) {
          const P at_max = of.max_constant - of.max_slope * q;
          g = map([](auto e, auto x, auto otherwise) FORCE { return e == 1 ? x : otherwise; }, e, at_max, g);
        }
      }
      return map([](auto g, auto none) FORCE { return none != 0 ? none - none : g; }, g, of.ignored);
    });
  }
  INLINE typename Layout<T>::Labels labels_if(bool there) const {
    return there ? this->labels() : typename Layout<T>::Labels{};
  }
  template <bool kLabel, bool kWeights>
  void gradient() const {
    const Call& call = this->call;
    const P m = of_position(call.max);
    const P factor = of_position(call.factor), share = of_position(call.position_weight);
    const P ignored = call.ignored ? this->get(call.ignored) : P::all(0);
    const Gradient of{factor,  of_position(call.at_label),     share,
                      ignored, of_position(call.max_constant), of_position(call.max_slope)};
    const auto e = [&](int64_t s) FORCE { return exponential(logits(s) - m); };
    if constexpr (kWeights && !kLabel) {
      if (call.max_constant) return write_gradient<kLabel, kWeights, true>(e, of);
    }
    write_gradient<kLabel, kWeights, false>(e, of);
  }

  // Loss and gradient in one pass: see position_losses and position_gradients in losses.py, whose formula this is.
  template <bool kLabel, bool kWeights>
  void loss() const {
    const Call& call = this->call;
    const Sums found = sums<kLabel, kWeights, true>();
    const P label_weight = of_position(call.label_weight), position_weight = of_position(call.position_weight);
    const P z_loss_weight = of_position(call.z_loss_weight);
    const C scale = *static_cast<const C*>(call.scale);
    P loss;
    Gradient of{};
#pragma GCC unroll 4
    for (int i = 0; i < (Layout<T>::kOneRow ? 1 : kVectors); ++i) {
      using V = typename P::V;
      const V zero = {}, m = found.m.v[i], others = found.others.v[i], z = z_loss_weight.v[i];
      const V l = found.label_logit.v[i] - m, w = kWeights ? position_weight.v[i] : zero;
      const V own = exp_vector<C>(l), exp_sum = others + own, total = exp_sum + kTiny;
      const V surplus = others + (own - 1), excess = surplus < 0 ? zero : surplus;
      const V log_sum = log1p_vector(excess), hot = scale * label_weight.v[i];
      V cost = zero, mass = zero;
      if constexpr (kLabel) {
        const V led = others * exp_vector<C>(l > -1 ? -l : zero + 1), nll = log1p_vector(l > -1 ? led : excess);
        cost += weighted_vector(label_weight.v[i], l > -1 ? nll : nll - l);
      }
      V weight_sum = zero;
      if constexpr (kWeights) {
        weight_sum = found.weight_sum.v[i];
        cost += weighted_vector(w, weight_sum * log_sum + found.gap.v[i]);
      }
      if (call.z_loss_weight) {
        const V finite = m - m == 0 ? m + log_sum : m, lse = exp_sum == 0 ? zero : finite;
        cost += weighted_vector(z, lse * lse);
        mass += scale * 2 * z * lse;
      }
      const V share = scale * w;
      loss.v[i] = cost, of.share.v[i] = share;
      if constexpr (kWeights && !kLabel) {
        const V weight = others < 1 ? found.other_weight.v[i] : weight_sum;
        of.max_constant.v[i] = (mass + share * weight) / total;
        of.max_slope.v[i] = others < 1 ? share * (excess / total) : share;
      }
      mass += share * weight_sum;
      of.factor.v[i] = (mass + hot) / total, of.at_label.v[i] = (mass * own - hot * others) / total;
      of.ignored.v[i] = ((label_weight.v[i] == 0) & (w == 0) & (z == 0)) ? zero + 1 : zero;
    }
    if constexpr (Layout<T>::kOneRow) {
      P* const numbers[] = {&loss,     &of.factor,  &of.at_label,
                            &of.share, &of.ignored, &of.max_constant, &of.max_slope};
      for (P* p : numbers) {
        for (auto& v : p->v) v = p->v[0];
      }
    }
    report(call.loss_out, loss);
    const auto e = [&](int64_t s) FORCE { return kept_exponential(s, found.m); };
    if constexpr (kWeights && !kLabel) {
      if (any_below(1, found.others)) return write_gradient<kLabel, kWeights, true>(e, of);  // or the formulas are one
    }
    write_gradient<kLabel, kWeights, false>(e, of);
  }

  void run(int64_t unit) {
    this->locate(unit);
    const bool label = this->call.label, weights = this->call.weights;
    switch (this->call.op) {
      case Op::kSoftmax: softmax(); break;
      case Op::kLogSoftmax: log_softmax(); break;
      case Op::kSoftmaxVjp: softmax_vjp(); break;
      case Op::kLogSoftmaxVjp: log_softmax_vjp(); break;
      case Op::kMoments: moments(); break;
      case Op::kTotal: report(this->call.sum_out, sum([&](int64_t s) FORCE { return logits_or_0(s); })); break;
      case Op::kStatistics:
        label ? (weights ? statistics<true, true>() : statistics<true, false>())
              : (weights ? statistics<false, true>() : statistics<false, false>());
        break;
      case Op::kGradient:
        label ? (weights ? gradient<true, true>() : gradient<true, false>())
              : (weights ? gradient<false, true>() : gradient<false, false>());
        break;
      case Op::kLoss:
        label ? (weights ? loss<true, true>() : loss<true, false>()) : loss<false, true>();
        break;
    }
    if (this->call.result) this->finish();
  }
};

Layout layout_of(const Shape& shape, int64_t lanes) {
  if (shape.inner == 1 && shape.classes >= kLong) return Layout::kRows;
  if (shape.inner == 1 && shape.classes >= kShort) return Layout::kQuads;
  if (shape.inner >= lanes) return Layout::kStrips;
  return shape.classes * shape.inner < kAlternate * lanes ? Layout::kGathered : Layout::kInterleaved;
}

template <class T, template <class> class L>
Plan plan_of(Layout layout, const Shape& shape) {
  return {layout, L<T>::units(shape), L<T>::scratch_size(shape) * sizeof(typename Compute<T>::Type)};
}
template <class T>
Plan plan_for(const Shape& shape) {
  const Layout layout = layout_of(shape, Pack<typename Compute<T>::Type>::kLanes);
  switch (layout) {
    case Layout::kRows: return plan_of<T, Rows>(layout, shape);
    case Layout::kQuads:
      if constexpr (kShort < kLong) return plan_of<T, Quads>(layout, shape);
      __builtin_unreachable();
    case Layout::kInterleaved: return plan_of<T, Interleaved>(layout, shape);
    case Layout::kStrips: return plan_of<T, Strips>(layout, shape);
    default: return plan_of<T, Gathered>(layout, shape);
  }
}

template <class T, template <class> class L>
void run_units(const Call& call, int64_t begin, int64_t end, void* scratch) {
  Unit<T, L> unit{{{call, static_cast<typename Compute<T>::Type*>(scratch)}}};
  for (int64_t index = begin; index < end; ++index) unit.run(index);
}
template <class T>
void run_for(const Call& call, int64_t begin, int64_t end, void* scratch) {
  switch (layout_of(call.shape, Pack<typename Compute<T>::Type>::kLanes)) {
    case Layout::kRows: return run_units<T, Rows>(call, begin, end, scratch);
    case Layout::kQuads:
      if constexpr (kShort < kLong) return run_units<T, Quads>(call, begin, end, scratch);
      __builtin_unreachable();
    case Layout::kInterleaved: return run_units<T, Interleaved>(call, begin, end, scratch);
    case Layout::kStrips: return run_units<T, Strips>(call, begin, end, scratch);
    case Layout::kGathered: return run_units<T, Gathered>(call, begin, end, scratch);
  }
}

}  // namespace

Plan plan(const Call& call) {
  switch (call.dtype) {
    case Dtype::kFloat32: return plan_for<float>(call.shape);
    case Dtype::kFloat64: return plan_for<double>(call.shape);
    case Dtype::kBfloat16: return plan_for<Bfloat16>(call.shape);
    default: return plan_for<Float16>(call.shape);
  }
}

void run(const Call& call, int64_t begin, int64_t end, void* scratch) {
  switch (call.dtype) {
    case Dtype::kFloat32: return run_for<float>(call, begin, end, scratch);
    case Dtype::kFloat64: return run_for<double>(call, begin, end, scratch);
    case Dtype::kBfloat16: return run_for<Bfloat16>(call, begin, end, scratch);
    case Dtype::kFloat16: return run_for<Float16>(call, begin, end, scratch);
  }
}

}  // namespace jaxsoft::JAXSOFT_ISA
