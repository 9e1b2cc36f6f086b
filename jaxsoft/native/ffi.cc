// XLA's foreign-function handlers: what the arrays are, how the work is cut and shared between XLA's threads.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsoft {

namespace ffi = xla::ffi;

namespace {
constexpr int64_t kLine = 1 << 10;    // the longest line of lanes
constexpr int64_t kSmall = 1 << 13;   // numbers that fit a first-level cache
constexpr int64_t kMedium = 1 << 16;  // a second-level cache with ease
constexpr int64_t kLarge = 1 << 18;   // a second-level cache at most
constexpr int64_t kVector = 16;

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }
}  // namespace

Plan::Plan(Op op, Shape shape) : outers(1), width(shape.inner), fold(1), classes(shape.classes) {
  if (shape.inner < 64 && shape.classes >= 4 * kVector) {
    for (fold = kVector; fold * shape.inner < 128 && fold * 32 <= shape.classes;) fold *= 2;
  }
  const int64_t row = round_up(shape.classes, fold) * shape.inner;
  if (shape.inner < kLine && row < kSmall) {
    outers = std::min(shape.outer, kSmall / row);
  } else {
    width = std::min(width, std::clamp(round_up(kMedium / shape.classes, kVector), int64_t{64}, kLine));
  }
  lanes = round_up(outers * width * fold, kVector);
  const bool elementwise = op == Op::kGradient;
  if (lanes * ceil_div(classes, fold) > (elementwise ? kSmall : kLarge)) {
    classes = std::min(classes, std::max<int64_t>(1, (elementwise ? kSmall : kMedium) / lanes) * fold);
  }
  size = lanes * ceil_div(classes, fold);
  blocks = ceil_div(shape.outer, outers);
  strips = ceil_div(shape.inner, width);
  chunks = ceil_div(shape.classes, classes);
}

namespace {

Kernel choose_kernel() {
#ifdef JAXSOFT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return avx512::run;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::run;
#endif
  return baseline::run;
}

// A thread keeps its scratch: fresh pages for every call would cost more than the call. Null where there is no memory.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  thread_local std::unique_ptr<void, Free> scratch;
  thread_local size_t held = 0;
  if (bytes > held) {
    const size_t wanted = round_up(bytes, 1 << 16);
    scratch.reset(std::aligned_alloc(64, wanted));
    held = scratch ? wanted : 0;
  }
  return scratch.get();
}

// Runs body(0) … body(pieces − 1) on the caller and on whichever threads of the pool come to help. The caller waits
// for pieces, never for threads: the pool's may all be callers themselves. A helper that comes late finds no piece
// left and touches nothing but the state it shares.
void parallel(ffi::ThreadPool& pool, int64_t pieces, size_t scratch, const std::function<void(int64_t)>& body) {
  struct State {
    const std::function<void(int64_t)>* body;
    int64_t pieces;
    std::fenv_t mode;
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;

    void work() {
      int64_t ran = 0;
      for (int64_t piece; (piece = next++) < pieces; ++ran) (*body)(piece);
      if (ran == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      done += ran;
      if (done == pieces) finished.notify_one();
    }
  };
  const auto state = std::make_shared<State>();
  state->body = &body;
  state->pieces = pieces;
  const int64_t helpers = std::min(pool.num_threads(), pieces) - 1;
  if (helpers > 0) std::fegetenv(&state->mode);
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([state, scratch] {
      if (state->next >= state->pieces || !thread_scratch(scratch)) return;
      std::fenv_t own;  // XLA sets whether denormals are flushed on its own thread alone
      std::fegetenv(&own);
      std::fesetenv(&state->mode);
      state->work();
      std::fesetenv(&own);
    });
  }
  state->work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == pieces; });
}

// Most of the time of a large array is the first touch of its pages.
void expect_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  if (bytes < 4 * kHuge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = round_up(begin, kHuge);
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
}

ffi::Error run(ffi::ThreadPool& pool, const Call& call) {
  static const Kernel kernel = choose_kernel();
  const int64_t elements = call.shape.outer * call.shape.classes * call.shape.inner;
  if (elements == 0) return ffi::Error::Success();
  const Plan plan(call.op, call.shape);
  const size_t wide = call.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  const size_t narrow = call.dtype == Dtype::kBfloat16 || call.dtype == Dtype::kFloat16 ? 2 : wide;
  if (call.result) expect_huge_pages(call.result, elements * narrow);
  const int64_t positions = call.shape.outer * call.shape.inner, tiles = plan.blocks * plan.strips;
  const bool reduced_in_parts = plan.chunks > 1 && call.op != Op::kGradient;
  const size_t scratch = scratch_size(plan) * wide;
  const size_t shared = reduced_in_parts ? kPartials * plan.chunks * positions * wide / sizeof(double) + 1 : 1;
  const std::unique_ptr<double[]> partials(new (std::nothrow) double[shared]);
  if (!partials || !thread_scratch(scratch)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxsoft: no memory for a kernel's scratch");
  }

  const auto stage = [&](Stage stage, int64_t count) {
    // Pieces are large enough to be worth a thread, and neighbours, so that threads do not meet in one page.
    const int64_t worth = std::min(count, elements / (1 << 14));
    const int64_t pieces = std::max<int64_t>(1, std::min(worth, 8 * pool.num_threads()));
    const auto body = [&](int64_t piece) {
      kernel(call, plan, stage, piece * count / pieces, (piece + 1) * count / pieces,
             thread_scratch(scratch), partials.get());
    };
    if (pieces == 1) {
      body(0);
    } else {
      parallel(pool, pieces, scratch, body);
    }
  };
  if (!reduced_in_parts) {
    stage(Stage::kAll, tiles * plan.chunks);
  } else {
    if (call.op != Op::kSoftmaxVjp && call.op != Op::kLogSoftmaxVjp) {
      stage(Stage::kMax, tiles * plan.chunks);
      stage(Stage::kMergeMax, tiles);
    }
    stage(Stage::kSum, tiles * plan.chunks);
    stage(Stage::kMergeSum, tiles);
    if (call.result) stage(Stage::kWrite, tiles * plan.chunks);
  }
  return ffi::Error::Success();
}

using Array = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

template <class T = void>
T* data(Array array) {
  return array.element_count() == 0 ? nullptr : static_cast<T*>(array.untyped_data());
}

// The call on `array`, whose axes `first` to `last`, counted from the end, are the classes.
Call call_on(Op op, Array array, int64_t first, int64_t last) {
  Call call{op, Dtype::kFloat32, {1, 1, 1}};
  switch (array.element_type()) {
    case ffi::DataType::F64: call.dtype = Dtype::kFloat64; break;
    case ffi::DataType::BF16: call.dtype = Dtype::kBfloat16; break;
    case ffi::DataType::F16: call.dtype = Dtype::kFloat16; break;
    default: break;
  }
  const auto dims = array.dimensions();
  const int64_t rank = dims.size();
  for (int64_t i = 0; i < rank; ++i) {
    (i - rank < first ? call.shape.outer : i - rank > last ? call.shape.inner : call.shape.classes) *= dims[i];
  }
  call.logits = array.untyped_data();
  return call;
}

void set_spread(Call& call, Array spread) {
  call.spread = data(spread);
  const int64_t elements = spread.element_count(), classes = call.shape.classes;
  if (elements != call.shape.outer * classes * call.shape.inner) call.spread_rows = elements / classes;
}

ffi::Error statistics(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Array label, Array spread,
                      Result max, Result tail, Result label_logit, Result spread_sum, Result gap) {
  Call call = call_on(Op::kStatistics, logits, first, last);
  call.label = data<int32_t>(label);
  set_spread(call, spread);
  call.max_out = data(*max);
  call.sum_out = data(*tail);
  call.label_out = data(*label_logit);
  call.spread_out = data(*spread_sum);
  call.gap_out = data(*gap);
  return run(pool, call);
}

ffi::Error moments(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Result max, Result tail,
                   Result lead_logit, Result gap, Result lead) {
  Call call = call_on(Op::kMoments, logits, first, last);
  call.max_out = data(*max);
  call.sum_out = data(*tail);
  call.label_out = data(*lead_logit);
  call.gap_out = data(*gap);
  call.lead_out = data<int32_t>(*lead);
  return run(pool, call);
}

ffi::Error gradient(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Array max, Array factor, Array
                    idle, Array label, Array at_label, Array share, Array spread, Result result) {
  Call call = call_on(Op::kGradient, logits, first, last);
  call.max = data(max);
  call.factor = data(factor);
  call.idle = data<bool>(idle);
  call.label = data<int32_t>(label);
  call.at_label = data(at_label);
  call.share = data(share);
  set_spread(call, spread);
  call.result = data(*result);
  return run(pool, call);
}

ffi::Error softmax(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Result probs) {
  Call call = call_on(Op::kSoftmax, logits, first, last);
  call.result = data(*probs);
  return run(pool, call);
}

ffi::Error log_softmax(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Result log_probs, Result max,
                       Result total) {
  Call call = call_on(Op::kLogSoftmax, logits, first, last);
  call.result = data(*log_probs);
  call.max_out = data(*max);
  call.sum_out = data(*total);
  return run(pool, call);
}

ffi::Error softmax_vjp(ffi::ThreadPool pool, int64_t first, int64_t last, Array probs, Array cotangent, Result result) {
  Call call = call_on(Op::kSoftmaxVjp, probs, first, last);
  call.cotangent = data(cotangent);
  call.result = data(*result);
  return run(pool, call);
}

ffi::Error log_softmax_vjp(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Array max, Array total,
                           Array cotangent, Result result) {
  Call call = call_on(Op::kLogSoftmaxVjp, logits, first, last);
  call.max = data(max);
  call.total = data(total);
  call.cotangent = data(cotangent);
  call.result = data(*result);
  return run(pool, call);
}

template <int arguments, int results>
auto binding() {
  if constexpr (results > 0) {
    return binding<arguments, results - 1>().template Ret<ffi::AnyBuffer>();
  } else if constexpr (arguments > 0) {
    return binding<arguments - 1, results>().template Arg<ffi::AnyBuffer>();
  } else {
    return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("first").Attr<int64_t>("last");
  }
}

}  // namespace
}  // namespace jaxsoft

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_statistics, jaxsoft::statistics, (jaxsoft::binding<3, 5>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_moments, jaxsoft::moments, (jaxsoft::binding<1, 5>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_gradient, jaxsoft::gradient, (jaxsoft::binding<8, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_softmax, jaxsoft::softmax, (jaxsoft::binding<1, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax, jaxsoft::log_softmax, (jaxsoft::binding<1, 3>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_softmax_vjp, jaxsoft::softmax_vjp, (jaxsoft::binding<2, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax_vjp, jaxsoft::log_softmax_vjp, (jaxsoft::binding<4, 1>()));
#pragma GCC visibility pop
