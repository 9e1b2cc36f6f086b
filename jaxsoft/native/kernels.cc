// The kernels, once for each instruction set. Every loop over lanes is written for the compiler to vectorise; nothing
// here may come from the standard library's templates, whose copy for one instruction set could be linked for another.
#include "kernels.h"

#include <float.h>
#include <math.h>

namespace jaxsoft::JAXSOFT_ISA {
namespace {

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Half precision, in integers: the same for every instruction set, and denormals survive flush-to-zero.

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bfloat16 x) { return bits_of<float>(uint32_t{x.bits} << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7f800000u;
  const uint32_t denormal = bits_of<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_of<float>(sign | (magnitude < 0x400u ? denormal : magnitude < 0x7c00u ? normal : special));
}

template <class T, class C>
__attribute__((always_inline)) inline T narrow(C x) {  // to nearest, ties to even
  if constexpr (sizeof(T) == sizeof(C)) {
    return x;
  } else {
    const uint32_t bits = bits_of<uint32_t>(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    uint32_t half;
    if constexpr (__is_same(T, Bfloat16)) {
      half = magnitude > 0x7f800000u ? 0x7fc0u : (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
    } else {
      const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
      const uint32_t denormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
      half = magnitude < 0x38800000u ? denormal : magnitude < 0x47800000u ? normal : 0x7c00u;
      half = magnitude > 0x7f800000u ? 0x7e00u : half;
    }
    return T{static_cast<uint16_t>(sign | half)};
  }
}

// ---- The exponential.

template <class C>
struct Exp;

template <>
struct Exp<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f, kLog2e = 0x1.715476p0f, kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -87.33654f;
  // Minimax for (exp(r) − 1 − r) / r² on |r| ≤ ln 2 / 2, within 4e-9 of exp(r).
  static constexpr float kTerms[] = {0x1.6a23cep-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f};
};

template <>
struct Exp<double> {
  using Bits = uint64_t;
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
__attribute__((always_inline)) inline C exponential(C x) {
  using E = Exp<C>;
  using Bits = typename E::Bits;
  const C rounded = x * E::kLog2e + E::kRound;  // n is in its last bits
  const C n = rounded - E::kRound;
  const C r = (x - n * E::kLn2Hi) - n * E::kLn2Lo;
  C q = E::kTerms[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(E::kTerms) / sizeof(C); ++i) q = q * r + E::kTerms[i];
  const C mantissa = 1 + (r + r * r * q);
  const C power = bits_of<C>((bits_of<Bits>(rounded) << E::kMantissa) + (Bits{E::kBias} << E::kMantissa));
  return x < E::kLowest ? 0 : mantissa * power;  // a product, for NaN to stay
}

// chosen ? x : y of vectors that are stored: of a plain choice between what is there and what is not GCC makes a store
// behind a branch, which labels make unpredictable.
template <class C>
__attribute__((always_inline)) inline C blend(bool chosen, C x, C y) {
  using Bits = typename Exp<C>::Bits;
  const Bits mask = -Bits{chosen};
  return bits_of<C>((bits_of<Bits>(x) & mask) | (bits_of<Bits>(y) & ~mask));
}

template <class T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

inline float logarithm(float x) { return logf(x); }
inline double logarithm(double x) { return log(x); }

// ---- A tile.

template <class T>
class Tile {
  using C = typename Compute<T>::Type;
  static constexpr int64_t kCached = 1 << 18, kFew = 32;
  static constexpr C kEpsilon = sizeof(C) == 4 ? C(FLT_EPSILON) : C(DBL_EPSILON);
  static constexpr C kLowest = sizeof(C) == 8           ? C(-DBL_MAX)
                               : __is_same(T, float)    ? C(-FLT_MAX)
                               : __is_same(T, Bfloat16) ? C(-0x1.fep127)
                                                        : C(-65504);

 public:
  Tile(const Call& call, const Plan& plan, void* scratch, void* partials)
      : call_(call), plan_(plan), partials_(static_cast<C*>(partials)), fold_bits_(__builtin_ctzll(plan.fold)) {
    C* next = static_cast<C*>(scratch);
    C** tiles[] = {&a_, &b_};
    C** lanes[] = {&max_, &sum_, &spread_, &gap_, &part_, &scale_, &share_, &idle_, &label_, &taken_};
    for (C** tile : tiles) *tile = next, next += plan.size;
    for (C** lane : lanes) *lane = next, next += plan.lanes;
  }

  void run(Stage stage, int64_t index) {
    locate(index);
    switch (stage) {
      case Stage::kAll:
        if (maximises()) load_logits(), find_max();
        if (sums()) load_summands(), find_sums(), report();
        if (call_.result) write(false);
        break;
      case Stage::kMax:
        load_logits(), find_max();
        save(max_, 0);
        break;
      case Stage::kSum:
        if (maximises()) load_logits(), restore(max_, 0);
        load_summands(), find_sums();
        save(sum_, 1);
        if (call_.spread || leads()) save(spread_, 2), save(gap_, 3);
        if (leads()) save(label_, 4);
        break;
      case Stage::kWrite:
        restore(max_, 0), restore(sum_, 1);
        write(true);
        break;
      case Stage::kMergeMax:
        merge(0, [](C x, C y) __attribute__((always_inline)) { return largest(x, y); });
        break;
      case Stage::kMergeSum:
        for (int i = 1; i < (call_.spread || leads() ? 4 : 2); ++i)
          merge(i, [](C x, C y) __attribute__((always_inline)) { return x + y; });
        if (leads()) merge(4, [](C x, C y) __attribute__((always_inline)) { return x < y ? x : y; });
        restore(max_, 0), restore(sum_, 1);
        if (call_.spread || leads()) restore(spread_, 2), restore(gap_, 3);
        if (leads()) restore(label_, 4);
        report();
        break;
    }
  }

 private:
  bool maximises() const {
    return call_.op == Op::kStatistics || leads() || call_.op == Op::kSoftmax || call_.op == Op::kLogSoftmax;
  }
  bool leads() const { return call_.op == Op::kMoments; }
  bool sums() const { return call_.op != Op::kGradient; }

  static C largest(C x, C y) { return (y <= x) | (x != x) ? x : y; }  // NaN where either is

  void locate(int64_t index) {
    const Shape& shape = call_.shape;
    chunk_ = index % plan_.chunks, index /= plan_.chunks;
    const int64_t strip = index % plan_.strips, block = index / plan_.strips;
    outer_ = block * plan_.outers, outers_ = smaller(plan_.outers, shape.outer - outer_);
    inner_ = strip * plan_.width, width_ = smaller(plan_.width, shape.inner - inner_);
    class_ = chunk_ * plan_.classes, classes_ = smaller(plan_.classes, shape.classes - class_);
    positions_ = outers_ * width_;
    group_ = plan_.fold * width_;
    lanes_ = (outers_ * group_ + 15) / 16 * 16;
    size_ = (classes_ + plan_.fold - 1) / plan_.fold * lanes_;
    first_ = outer_ * shape.inner + inner_;
  }

  int64_t offset(int64_t outer, int64_t c, int64_t i = 0) const {  // in the whole array, from indices of the tile
    return ((outer_ + outer) * call_.shape.classes + class_ + c) * call_.shape.inner + inner_ + i;
  }
  int64_t element(int64_t outer, int64_t c, int64_t i) const {  // of the tile
    return (c >> fold_bits_) * lanes_ + outer * group_ + (c & (plan_.fold - 1)) * width_ + i;
  }

  template <class F>
  void each_position(F body) const {  // with its lane
    if (plan_.fold == 1) {
      for (int64_t p = 0; p < positions_; ++p) body(first_ + p, p);
    } else {
      each_index([=](int64_t o, int64_t i) { body(first_ + o * width_ + i, o * group_ + i); });
    }
  }
  template <class F>
  void each_index(F body) const {
    for (int64_t o = 0; o < outers_; ++o)
      for (int64_t i = 0; i < width_; ++i) body(o, i);
  }

  // ---- Between memory and the tile, a group of lanes, which is contiguous in both, at a time.

  int64_t group_length(int64_t line) const { return smaller(group_, (classes_ - line * plan_.fold) * width_); }

  // Rows whose classes are not folded: vectors of lanes lie across them.
  bool transposed() const { return plan_.fold == 1 && call_.shape.inner == 1; }

  // From a tile's numbers to those of the next, which are fetched while this one is computed; 0 where a second-level
  // cache has them already.
  int64_t to_next() const {
    const Shape& shape = call_.shape;
    if (shape.outer * shape.classes * shape.inner < kCached) return 0;
    return plan_.strips > 1 ? width_ : outers_ * classes_ * width_;
  }
  template <int writing, class U>
  static void prefetch(U* from, int64_t length) {
    for (int64_t l = 0; l < length; l += int64_t(64 / sizeof(U))) __builtin_prefetch(from + l, writing, 2);
  }

  template <class Row>
  void load(Row row, C* tile, C padding) {  // from row(o), where the numbers of outer index o begin
    const int64_t step = plan_.fold * call_.shape.inner, lines = size_ / lanes_;
    if (transposed()) {
      for (int64_t line = 0; line < lines; ++line) {
#pragma omp simd
        for (int64_t o = 0; o < outers_; ++o) tile[line * lanes_ + o] = widen(row(o)[line]);
      }
    }
    const int64_t ahead = to_next();
    for (int64_t o = 0; o < outers_ && !transposed(); ++o) {
      const auto* from = row(o);
      C* to = tile + o * group_;
      for (int64_t line = 0; line < lines; ++line, from += step, to += lanes_) {
        const int64_t length = group_length(line);
        if (ahead != 0) prefetch<0>(from + ahead, length);
#pragma omp simd
        for (int64_t l = 0; l < length; ++l) to[l] = widen(from[l]);
        for (int64_t l = length; l < group_; ++l) to[l] = padding;
      }
    }
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t l = outers_ * group_; l < lanes_; ++l) tile[line * lanes_ + l] = padding;
  }
  template <class U>
  void load(const U* array, C* tile, C padding) {
    const U* from = array + offset(0, 0);
    const int64_t row = call_.shape.classes * call_.shape.inner;
    load([=](int64_t o) __attribute__((always_inline)) { return from + o * row; }, tile, padding);
  }

  template <class F>
  void store(F value) {
    T* result = static_cast<T*>(call_.result) + offset(0, 0);
    const int64_t row = call_.shape.classes * call_.shape.inner, step = plan_.fold * call_.shape.inner;
    if (transposed()) {
      each([&](int64_t e, int64_t l) __attribute__((always_inline)) { a_[e] = value(e, l); });
      for (int64_t o = 0; o < outers_; ++o) {
#pragma omp simd
        for (int64_t c = 0; c < classes_; ++c) result[o * row + c] = narrow<T>(a_[c * lanes_ + o]);
      }
      return;
    }
    const int64_t ahead = to_next();
    for (int64_t o = 0; o < outers_; ++o) {
      T* to = result + o * row;
      const int64_t lane = o * group_;
      for (int64_t line = 0, start = lane; start < size_; ++line, start += lanes_, to += step) {
        const int64_t length = group_length(line);
        if (ahead != 0) prefetch<1>(to + ahead, length);
#pragma omp simd
        for (int64_t l = 0; l < length; ++l) to[l] = narrow<T>(value(start + l, lane + l));
      }
    }
  }

  void load_logits() { load(static_cast<const T*>(call_.logits), a_, C(-INFINITY)); }
  void load_probs() { load(static_cast<const T*>(call_.logits), a_, C(0)); }
  void load_cotangent() { load(static_cast<const T*>(call_.cotangent), b_, C(0)); }

  void load_spread() {
    const C* spread = static_cast<const C*>(call_.spread);
    if (call_.spread_rows == 0) return load(spread, b_, C(0));
    const int64_t sharing = call_.shape.outer / call_.spread_rows;
    const auto row = [=](int64_t o) { return spread + (outer_ + o) / sharing * call_.shape.classes + class_; };
    if (call_.shape.inner == 1) return load(row, b_, C(0));
    for (int64_t e = 0; e < size_; ++e) b_[e] = 0;
    for (int64_t o = 0; o < outers_; ++o)
      for (int64_t c = 0; c < classes_; ++c)
        for (int64_t i = 0; i < width_; ++i) b_[element(o, c, i)] = row(o)[c];
  }

  void load_summands() {
    if (call_.op == Op::kSoftmaxVjp) load_probs();
    if (call_.op == Op::kSoftmaxVjp || call_.op == Op::kLogSoftmaxVjp) load_cotangent();
    if (call_.op == Op::kStatistics && call_.spread) load_spread();
  }

  // ---- Reductions.

  template <class F>
  void each(F body) {
    for (int64_t start = 0; start < size_; start += lanes_) {
#pragma omp simd
      for (int64_t l = 0; l < lanes_; ++l) body(start + l, l);
    }
  }

  // Brings the folded classes' lanes together; each of them then holds the result. Lanes but the first of a group are
  // combined with the next group's, and overwritten.
  template <class F>
  void unfold(C* x, F combine) {
    for (int64_t half = group_ / 2; half >= width_; half /= 2) {
#pragma omp simd
      for (int64_t l = 0; l < lanes_ - half; ++l) x[l] = combine(x[l], x[half + l]);
    }
    repeat(x);
  }

  void repeat(C* x) {  // what the first fold of every group holds
    if (plan_.fold == 1) return;
    for (int64_t o = 0; o < outers_; ++o, x += group_) {
      if (width_ == 1) {
        const C value = *x;
#pragma omp simd
        for (int64_t l = 0; l < group_; ++l) x[l] = value;
      } else {
        for (int64_t l = width_; l < group_; ++l) x[l] = x[l - width_];
      }
    }
  }

  void find_max() {
    for (int64_t l = 0; l < lanes_; ++l) max_[l] = kLowest;
    each([this](int64_t e, int64_t l) __attribute__((always_inline)) { max_[l] = largest(max_[l], a_[e]); });
    unfold(max_, [](C x, C y) __attribute__((always_inline)) { return largest(x, y); });
  }

  // Sums of up to 64 terms are summed in turn: what rounding a long row's sum would gather stays small.
  template <class F>
  void sum(C* to, F term) {
    C* part = part_;
    for (int64_t l = 0; l < lanes_; ++l) to[l] = 0;
    for (int64_t block = 0; block < size_; block += 64 * lanes_) {
      for (int64_t l = 0; l < lanes_; ++l) part[l] = 0;
      for (int64_t start = block; start < smaller(size_, block + 64 * lanes_); start += lanes_) {
#pragma omp simd
        for (int64_t l = 0; l < lanes_; ++l) part[l] += term(start + l, l);
      }
#pragma omp simd
      for (int64_t l = 0; l < lanes_; ++l) to[l] += part[l];
    }
    unfold(to, [](C x, C y) __attribute__((always_inline)) { return x + y; });
  }

  void find_sums() {
    C *const a = a_, *const b = b_, *const max = max_;
    switch (call_.op) {
      case Op::kStatistics:
        if (call_.spread) {
          sum(spread_, [=](int64_t e, int64_t) __attribute__((always_inline)) { return b[e]; });
          sum(gap_, [=](int64_t e, int64_t l) __attribute__((always_inline)) {
            return b[e] == 0 ? 0 : b[e] * (max[l] - a[e]);
          });
        }
        if (compares()) {
          take_labels();
        } else {
          at_labels([&](int64_t e, auto...) { a[e] = C(-INFINITY); });
        }
        [[fallthrough]];
      case Op::kLogSoftmax:
        sum(sum_, [=](int64_t e, int64_t l) __attribute__((always_inline)) { return exponential(a[e] - max[l]); });
        break;
      case Op::kSoftmax:
        sum(sum_, [=](int64_t e, int64_t l) __attribute__((always_inline)) { return a[e] = exponential(a[e] - max[l]); });
        break;
      case Op::kSoftmaxVjp:
        sum(sum_, [=](int64_t e, int64_t) __attribute__((always_inline)) { return a[e] * b[e]; });
        break;
      case Op::kLogSoftmaxVjp:
        sum(sum_, [=](int64_t e, int64_t) __attribute__((always_inline)) { return b[e]; });
        break;
      case Op::kMoments:  // the classes of the largest logit are counted, not added up: that sum is exact
        find_leads();
        sum(sum_, [=](int64_t e, int64_t l) __attribute__((always_inline)) {
          const C below = max[l] - a[e], x = a[e] == max[l] ? 0 : exponential(-below);
          b[e] = x == 0 ? 0 : x * below;
          return x;
        });
        sum(gap_, [=](int64_t e, int64_t) __attribute__((always_inline)) { return b[e]; });
        break;
      case Op::kGradient:
        break;
    }
  }

  // How many classes have the largest logit, and the first of them.
  void find_leads() {
    C *const a = a_, *const max = max_, *const ties = spread_, *const lead = label_, *const first = taken_;
    for (int64_t l = 0; l < lanes_; ++l) {
      ties[l] = 0, lead[l] = C(call_.shape.classes);
      first[l] = C(class_ + l % group_ / width_);
    }
    C c = 0;
    for (int64_t start = 0; start < size_; start += lanes_, c += C(plan_.fold)) {
#pragma omp simd
      for (int64_t l = 0; l < lanes_; ++l) {
        const bool leads = a[start + l] == max[l];
        ties[l] += leads ? 1 : 0;
        lead[l] = leads && first[l] + c < lead[l] ? first[l] + c : lead[l];
      }
    }
    unfold(ties, [](C x, C y) __attribute__((always_inline)) { return x + y; });
    unfold(lead, [](C x, C y) __attribute__((always_inline)) { return x < y ? x : y; });
  }

  // With few classes, one to a line of lanes, labels are compared with each; else what is at a label is looked up.
  bool compares() const { return call_.label && plan_.fold == 1 && plan_.chunks == 1 && call_.shape.classes <= kFew; }

  void get_labels() {
    C* const label = label_;
    const int32_t* const from = call_.label + first_;
#pragma omp simd
    for (int64_t p = 0; p < positions_; ++p) label[p] = C(from[p]);
    for (int64_t l = positions_; l < lanes_; ++l) label[l] = -1;
  }
  template <class F>
  void compare_labels(F body) {
    const C* const label = label_;
    C c = 0;
    for (int64_t start = 0; start < size_; start += lanes_, ++c) {
#pragma omp simd
      for (int64_t l = 0; l < lanes_; ++l) body(start + l, l, label[l] == c);
    }
  }

  void take_labels() {  // out of the tile; of a label out of range the logit of the class that is nearest
    C *const a = a_, *const taken = taken_, *const label = label_, *const last = a_ + size_ - lanes_;
    get_labels();
    for (int64_t l = 0; l < lanes_; ++l) taken[l] = label[l] < 0 ? a[l] : last[l];
    compare_labels([=](int64_t e, int64_t l, bool is_label) __attribute__((always_inline)) {
      taken[l] = blend(is_label, a[e], taken[l]);
      a[e] = blend(is_label, C(-INFINITY), a[e]);
    });
  }

  template <class F>
  void at_labels(F body) {  // of the positions whose label is in the tile
    if (!call_.label) return;
    each_index([&](int64_t o, int64_t i) {
      const int64_t position = first_ + o * width_ + i, c = call_.label[position] - class_;
      if (0 <= c && c < classes_) body(element(o, c, i), position, o * group_ + i, offset(o, c, i));
    });
  }

  // ---- Tiles that hold a part of the classes leave their sums behind; the first of a position's holds the merged.

  C* partial(int quantity, int64_t chunk) {
    return partials_ + (quantity * plan_.chunks + chunk) * call_.shape.outer * call_.shape.inner;
  }
  void save(const C* x, int quantity) { put(x, partial(quantity, chunk_)); }
  void restore(C* x, int quantity) { get(partial(quantity, 0), x); }
  template <class F>
  void merge(int quantity, F combine) {
    C* to = partial(quantity, 0) + first_;
    for (int64_t chunk = 1; chunk < plan_.chunks; ++chunk) {
      const C* from = partial(quantity, chunk) + first_;
      for (int64_t p = 0; p < positions_; ++p) to[p] = combine(to[p], from[p]);
    }
  }

  // ---- Results.

  void put(const C* x, void* to, C more = 0) const {
    if (!to) return;
    each_position([=](int64_t position, int64_t lane) { static_cast<C*>(to)[position] = x[lane] + more; });
  }
  template <class U = C>
  void get(const void* from, C* x) {
    for (int64_t l = 0; l < lanes_; ++l) x[l] = 0;
    if (!from) return;
    each_position([=](int64_t position, int64_t lane) { x[lane] = static_cast<const U*>(from)[position]; });
    repeat(x);
  }

  void report() {  // what there is one number a position of
    put(max_, call_.max_out);
    if (leads()) {
      each_position([this](int64_t position, int64_t lane) {
        const bool any = spread_[lane] > 0;
        static_cast<C*>(call_.sum_out)[position] = sum_[lane] + (any ? spread_[lane] - 1 : 0);
        static_cast<C*>(call_.label_out)[position] = any ? max_[lane] : C(-INFINITY);
        static_cast<C*>(call_.gap_out)[position] = gap_[lane];
        call_.lead_out[position] = static_cast<int32_t>(label_[lane]);
      });
      return;
    }
    put(sum_, call_.sum_out, call_.op == Op::kLogSoftmax ? kEpsilon / 8 : 0);
    put(spread_, call_.spread_out);
    put(gap_, call_.gap_out);
    if (!call_.label_out) return;
    if (compares()) return put(taken_, call_.label_out);
    each_index([this](int64_t o, int64_t i) {
      const int64_t position = first_ + o * width_ + i, label = call_.label[position];
      const int64_t c = label < 0 ? 0 : smaller(label, call_.shape.classes - 1);
      const T logit = static_cast<const T*>(call_.logits)[offset(o, c - class_, i)];
      static_cast<C*>(call_.label_out)[position] = widen(logit);
    });
  }

  void write(bool reload) {
    C *const a = a_, *const b = b_, *const max = max_, *const sum = sum_, *const scale = scale_, *const share = share_;
    C *const idle = idle_, *const at_label = taken_;
    switch (call_.op) {
      case Op::kStatistics:
      case Op::kMoments:
        break;
      case Op::kSoftmax:
        for (int64_t l = 0; l < lanes_; ++l) scale[l] = 1 / (sum[l] + kEpsilon / 8);
        if (reload) {
          load_logits();
          store([=](int64_t e, int64_t l) __attribute__((always_inline)) {
            return exponential(a[e] - max[l]) * scale[l];
          });
        } else {
          store([=](int64_t e, int64_t l) __attribute__((always_inline)) { return a[e] * scale[l]; });
        }
        break;
      case Op::kLogSoftmax:
        if (reload) load_logits();
        each_position([=](int64_t, int64_t l) { scale[l] = logarithm(sum[l] + kEpsilon / 8); });
        repeat(scale);
        store([=](int64_t e, int64_t l) __attribute__((always_inline)) { return (a[e] - max[l]) - scale[l]; });
        break;
      case Op::kSoftmaxVjp:
        if (reload) load_summands();
        store([=](int64_t e, int64_t l) __attribute__((always_inline)) { return a[e] * (b[e] - sum[l]); });
        break;
      case Op::kLogSoftmaxVjp:
        if (reload) load_summands();
        load_logits();
        get(call_.max, max), get(call_.total, scale);
        for (int64_t l = 0; l < lanes_; ++l) scale[l] = 1 / scale[l];
        store([=](int64_t e, int64_t l) __attribute__((always_inline)) {
          return b[e] - exponential(a[e] - max[l]) * scale[l] * sum[l];
        });
        break;
      case Op::kGradient: {
        load_logits();
        if (call_.spread) load_spread();
        get(call_.max, max), get(call_.factor, scale), get(call_.share, share);
        get<bool>(call_.idle, idle);
        if (compares()) {
          get(call_.at_label, at_label), get_labels();
          const bool spreads = call_.spread;
          compare_labels([=](int64_t e, int64_t l, bool is_label) __attribute__((always_inline)) {
            const C product = exponential(a[e] - max[l]) * scale[l];
            const C gradient = (is_label ? at_label[l] : product) - (spreads ? share[l] * b[e] : 0);
            a[e] = idle[l] != 0 ? 0 : gradient;
          });
          store([=](int64_t e, int64_t) __attribute__((always_inline)) { return a[e]; });
          break;
        }
        if (call_.spread) {
          store([=](int64_t e, int64_t l) __attribute__((always_inline)) {
            const C gradient = exponential(a[e] - max[l]) * scale[l] - share[l] * b[e];
            return idle[l] != 0 ? 0 : gradient;
          });
        } else {
          store([=](int64_t e, int64_t l) __attribute__((always_inline)) {
            const C gradient = exponential(a[e] - max[l]) * scale[l];
            return idle[l] != 0 ? 0 : gradient;
          });
        }
        at_labels([=](int64_t e, int64_t position, int64_t lane, int64_t to) {
          if (idle[lane] != 0) return;
          C gradient = static_cast<const C*>(call_.at_label)[position];
          if (call_.spread) gradient -= share[lane] * b[e];
          static_cast<T*>(call_.result)[to] = narrow<T>(gradient);
        });
      }
    }
  }

  const Call& call_;
  const Plan& plan_;
  C* partials_;
  int fold_bits_;
  C *a_, *b_;  // the tile: logits, then what becomes of them; cotangent or spread
  C *max_, *sum_, *spread_, *gap_, *part_, *scale_, *share_, *idle_, *label_, *taken_;
  int64_t chunk_, outer_, outers_, inner_, width_, class_, classes_;
  int64_t positions_, first_;      // how many, and the index of the first
  int64_t group_, lanes_, size_;  // lanes of an outer index, of them all with padding, numbers
};

template <class T>
void run_tiles(const Call& call, const Plan& plan, Stage stage, int64_t begin, int64_t end, void* scratch,
               void* partials) {
  Tile<T> tile(call, plan, scratch, partials);
  const bool merging = stage == Stage::kMergeMax || stage == Stage::kMergeSum;
  for (int64_t index = begin; index < end; ++index) tile.run(stage, merging ? index * plan.chunks : index);
}

}  // namespace

void run(const Call& call, const Plan& plan, Stage stage, int64_t begin, int64_t end, void* scratch, void* partials) {
  switch (call.dtype) {
    case Dtype::kFloat32: return run_tiles<float>(call, plan, stage, begin, end, scratch, partials);
    case Dtype::kFloat64: return run_tiles<double>(call, plan, stage, begin, end, scratch, partials);
    case Dtype::kBfloat16: return run_tiles<Bfloat16>(call, plan, stage, begin, end, scratch, partials);
    case Dtype::kFloat16: return run_tiles<Float16>(call, plan, stage, begin, end, scratch, partials);
  }
}

}  // namespace jaxsoft::JAXSOFT_ISA
