// XLA's foreign-function handlers: they read the arrays, cut the work into pieces, and share it between XLA's threads.
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

struct Kernels {
  Plan (*plan)(const Call&);
  Kernel run;
};

Kernels choose_kernels() {
#ifdef JAXSOFT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return {avx512::plan, avx512::run};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {avx2::plan, avx2::run};
#endif
  return {baseline::plan, baseline::run};
}

// Each thread keeps its scratch, because new pages for every call would cost more than the call. Null without memory.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  thread_local std::unique_ptr<void, Free> scratch;
  thread_local size_t held = 0;
  if (bytes > held) {
    const size_t wanted = (bytes + 0xffff) / 0x10000 * 0x10000;
    scratch.reset(std::aligned_alloc(64, wanted));
    held = scratch ? wanted : 0;
  }
  return scratch.get();
}

// Runs body(0) … body(pieces − 1) on the caller and on threads of the pool that are free. The caller waits for pieces,
// never for threads, because all threads of the pool may be callers themselves. A helper that comes late finds no
// piece left, and touches only the shared state.
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
      if (state->next >= state->pieces || (scratch > 0 && !thread_scratch(scratch))) return;
      std::fenv_t own;  // XLA sets the flushing of denormals only on its own thread
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

// The first touch of a large array's pages takes most of its time.
void expect_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  if (bytes < 4 * kHuge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + kHuge - 1) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
}

ffi::Error run(ffi::ThreadPool& pool, const Call& call) {
  static const Kernels kernels = choose_kernels();
  const int64_t elements = call.shape.outer * call.shape.classes * call.shape.inner;
  if (elements == 0) return ffi::Error::Success();
  const Plan plan = kernels.plan(call);
  const size_t wide = call.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  const size_t narrow = call.dtype == Dtype::kBfloat16 || call.dtype == Dtype::kFloat16 ? 2 : wide;
  if (call.result) expect_huge_pages(call.result, elements * narrow);
  if (plan.scratch > 0 && !thread_scratch(plan.scratch)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxsoft: no memory for a kernel's scratch");
  }
  const auto scratch = [&] { return plan.scratch > 0 ? thread_scratch(plan.scratch) : nullptr; };
  // Pieces are large enough to be worth a thread, and contiguous, so that threads do not share pages.
  const int64_t worth = std::min(plan.units, elements / (1 << 14));
  const int64_t pieces = std::max<int64_t>(1, std::min(worth, 8 * pool.num_threads()));
  const auto body = [&](int64_t piece) {
    kernels.run(call, piece * plan.units / pieces, (piece + 1) * plan.units / pieces, scratch());
  };
  if (pieces == 1) {
    body(0);
  } else {
    parallel(pool, pieces, plan.scratch, body);
  }
  return ffi::Error::Success();
}

using Array = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

template <class T = void>
T* data(Array array) {
  return array.element_count() == 0 ? nullptr : static_cast<T*>(array.untyped_data());
}

// The call for `array`, whose class axes are `first` to `last`, counted from the end.
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

void set_weights(Call& call, Array weights) {
  call.weights = data(weights);
  const int64_t elements = weights.element_count(), classes = call.shape.classes;
  if (elements != call.shape.outer * classes * call.shape.inner) call.weight_rows = elements / classes;
}

ffi::Error statistics(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Array label, Array weights,
                      Result max, Result sum_others, Result label_logit, Result weight_sum, Result gap,
                      Result other_weight) {
  Call call = call_on(Op::kStatistics, logits, first, last);
  call.label = data<int32_t>(label);
  set_weights(call, weights);
  call.max_out = data(*max);
  call.sum_out = data(*sum_others);
  call.label_out = data(*label_logit);
  call.weight_sum_out = data(*weight_sum);
  call.gap_out = data(*gap);
  call.other_weight_out = data(*other_weight);
  return run(pool, call);
}

ffi::Error moments(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Result max, Result sum_others,
                   Result leader_logit, Result gap, Result leader) {
  Call call = call_on(Op::kMoments, logits, first, last);
  call.max_out = data(*max);
  call.sum_out = data(*sum_others);
  call.label_out = data(*leader_logit);
  call.gap_out = data(*gap);
  call.leader_out = data<int32_t>(*leader);
  return run(pool, call);
}

ffi::Error gradient(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Array max, Array factor,
                    Array ignored, Array label, Array at_label, Array position_weight, Array max_constant,
                    Array max_slope, Array weights, Result result) {
  Call call = call_on(Op::kGradient, logits, first, last);
  call.max = data(max);
  call.factor = data(factor);
  call.ignored = data<bool>(ignored);
  call.label = data<int32_t>(label);
  call.at_label = data(at_label);
  call.max_constant = data(max_constant);
  call.max_slope = data(max_slope);
  call.position_weight = data(position_weight);
  set_weights(call, weights);
  call.result = data(*result);
  return run(pool, call);
}

ffi::Error loss(ffi::ThreadPool pool, int64_t first, int64_t last, Array logits, Array label, Array label_weight,
                Array position_weight, Array z_loss_weight, Array weights, Array scale, Result loss, Result result) {
  Call call = call_on(Op::kLoss, logits, first, last);
  call.label = data<int32_t>(label);
  call.label_weight = data(label_weight);
  call.position_weight = data(position_weight);
  call.z_loss_weight = data(z_loss_weight);
  set_weights(call, weights);
  call.scale = data(scale);
  call.loss_out = data(*loss);
  call.result = data(*result);
  return run(pool, call);
}

ffi::Error total(ffi::ThreadPool pool, int64_t first, int64_t last, Array numbers, Result sum) {
  Call call = call_on(Op::kTotal, numbers, first, last);
  call.sum_out = data(*sum);
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
extern "C" const char* const jaxsoft_sources = JAXSOFT_SOURCES;
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_statistics, jaxsoft::statistics, (jaxsoft::binding<3, 6>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_moments, jaxsoft::moments, (jaxsoft::binding<1, 5>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_gradient, jaxsoft::gradient, (jaxsoft::binding<10, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_loss, jaxsoft::loss, (jaxsoft::binding<7, 2>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_total, jaxsoft::total, (jaxsoft::binding<1, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_softmax, jaxsoft::softmax, (jaxsoft::binding<1, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax, jaxsoft::log_softmax, (jaxsoft::binding<1, 3>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_softmax_vjp, jaxsoft::softmax_vjp, (jaxsoft::binding<2, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsoft_log_softmax_vjp, jaxsoft::log_softmax_vjp, (jaxsoft::binding<4, 1>()));
#pragma GCC visibility pop
