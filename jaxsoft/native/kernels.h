// What the kernels compute, and in which pieces; free of XLA.
#pragma once

#include <cstdint>

namespace jaxsoft {

// A row-major array around its class axes: every pair of an outer and an inner index is a position, a vector of
// `classes` numbers that lie `inner` apart.
struct Shape {
  int64_t outer, classes, inner;
};

enum class Dtype { kFloat32, kFloat64, kBfloat16, kFloat16 };

enum class Op { kStatistics, kMoments, kGradient, kSoftmax, kLogSoftmax, kSoftmaxVjp, kLogSoftmaxVjp };

// One call of a handler. Half precision is computed in float; what has one number a position (max, factor, ...) and
// the spread are of that compute dtype. Absent arrays are null.
struct Call {
  Op op;
  Dtype dtype;
  Shape shape;
  const void* logits = nullptr;  // of softmax_vjp the probabilities
  const void* cotangent = nullptr;
  const void* spread = nullptr;
  int64_t spread_rows = 0;  // rows of `classes` that consecutive outer indices share; 0: one weight a logit
  const int32_t* label = nullptr;
  const bool* idle = nullptr;
  const void *max = nullptr, *total = nullptr, *factor = nullptr, *at_label = nullptr, *share = nullptr;
  void* result = nullptr;
  void *max_out = nullptr, *sum_out = nullptr, *label_out = nullptr, *spread_out = nullptr, *gap_out = nullptr;
  int32_t* lead_out = nullptr;
};

// How an array is cut into tiles, from its shape alone. A tile is brought into a cache and widened, and each of its
// positions is summed in vector lanes of its own, in an order that depends on classes and inner alone: not on what else
// is in the tile. A line of lanes is (outer index, fold, inner index): where the inner indices do not fill vectors,
// `fold` consecutive classes lie side by side, contiguous as in memory, and their sums are added up at the end. Short
// vectors with few inner indices are not folded; of those with one, rows, a tile holds the transpose.
struct Plan {
  int64_t outers, width, fold;  // outer indices, inner indices, folded classes of a tile
  int64_t blocks, strips;       // tiles along outer and inner
  int64_t classes, chunks;      // classes of a tile; its positions are finished at once if they are all
  int64_t lanes, size;          // of a tile, both padded to whole vectors

  Plan(Op op, Shape shape);
};

enum class Stage {
  kAll,                 // of tiles that hold all classes; of others, one after another:
  kMax, kMergeMax,      // the largest logit of each tile, of each position
  kSum, kMergeSum,      // sums likewise
  kWrite,               // the result
};

// Runs a stage over pieces [begin, end): tiles, or positions where stages merge. `scratch` is the thread's own,
// `partials` holds 5 numbers for each tile's positions and is shared. Both are allocated by the caller.
using Kernel = void (*)(const Call&, const Plan&, Stage, int64_t begin, int64_t end, void* scratch, void* partials);

inline constexpr int kPartials = 5;  // max, sum, spread or ties, gap, lead
inline int64_t scratch_size(const Plan& plan) { return 2 * plan.size + 10 * plan.lanes; }

// The same source, compiled for each instruction set.
#define JAXSOFT_DECLARE(isa) \
  namespace isa {            \
  void run(const Call&, const Plan&, Stage, int64_t, int64_t, void*, void*); \
  }
JAXSOFT_DECLARE(baseline)
JAXSOFT_DECLARE(avx2)
JAXSOFT_DECLARE(avx512)
#undef JAXSOFT_DECLARE

}  // namespace jaxsoft
