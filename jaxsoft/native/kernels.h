// What the kernels compute, and in which pieces, without XLA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxsoft {

// A row-major array around its class axes: every pair of an outer and an inner index is a position, a vector of
// `classes` numbers that are `inner` apart.
struct Shape {
  int64_t outer, classes, inner;
};

enum class Dtype { kFloat32, kFloat64, kBfloat16, kFloat16 };

enum class Op {
  kStatistics, kMoments, kGradient, kLoss, kTotal, kSoftmax, kLogSoftmax, kSoftmaxVjp, kLogSoftmaxVjp
};

// One call of a handler. Half precision is computed in float; arrays of one number per position (max, factor, ...) and
// target weights have that compute dtype. Absent arrays are null.
struct Call {
  Op op;
  Dtype dtype;
  Shape shape;
  const void* logits = nullptr;     // for softmax_vjp, the probabilities
  const void* cotangent = nullptr;  // of the logits' shape and dtype
  const void* weights = nullptr;    // target weights
  int64_t weight_rows = 0;          // rows of `classes` that consecutive outer indices share; 0: one weight per logit
  const int32_t* label = nullptr;
  const bool* ignored = nullptr;
  const void *max = nullptr, *total = nullptr, *factor = nullptr, *at_label = nullptr;
  const void *max_constant = nullptr, *max_slope = nullptr;
  const void *label_weight = nullptr, *position_weight = nullptr, *z_loss_weight = nullptr, *scale = nullptr;
  void* result = nullptr;
  void *loss_out = nullptr, *max_out = nullptr, *sum_out = nullptr, *label_out = nullptr;
  void *weight_sum_out = nullptr, *gap_out = nullptr, *other_weight_out = nullptr;
  int32_t* leader_out = nullptr;
};

// How a call is cut into units; depends only on classes and inner, because a row's bits must not depend on other rows.
enum class Layout {
  kRows,         // lanes of a vector are classes of one position, contiguous in memory
  kQuads,        // as kRows, but each vector of a pack belongs to another row
  kInterleaved,  // lanes are the classes of a few positions, which alternate in memory
  kStrips,       // lanes are contiguous positions, and the classes follow one another
  kGathered      // as kStrips, for positions that are not contiguous or too few, in a contiguous copy
};

// Runs units [begin, end) with the thread's own scratch, null where the plan has none.
using Kernel = void (*)(const Call&, int64_t begin, int64_t end, void* scratch);

struct Plan {
  Layout layout;
  int64_t units;
  size_t scratch;  // bytes
};

// The same source, compiled for each instruction set.
#define JAXSOFT_DECLARE(isa)                           \
  namespace isa {                                      \
  void run(const Call&, int64_t, int64_t, void*);      \
  Plan plan(const Call&);                              \
  }
JAXSOFT_DECLARE(baseline)
JAXSOFT_DECLARE(avx2)
JAXSOFT_DECLARE(avx512)
#undef JAXSOFT_DECLARE

}  // namespace jaxsoft
