#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace dcext {

template <typename Signature>
class FunctionRef;

/** A borrowed callable: two words, no allocation. Valid only while the callable it was made from lives. */
template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
 public:
  template <typename F,
            typename = std::enable_if_t<!std::is_same<std::decay_t<F>, FunctionRef>::value>>
  FunctionRef(F&& callable)  // NOLINT: implicit on purpose, so that lambdas can be passed
      : object_(const_cast<void*>(static_cast<const void*>(&callable))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}

  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

/** Something that runs independent tasks on several threads.
 *  Two exist: the library's own pool (runtime/thread_pool.h) and torch's intra-op threads (ops.cpp), which the
 *  layers use so that they never compete with torch's spinning OpenMP threads for the same cores. */
class Executor {
 public:
  virtual ~Executor() = default;

  /** Threads that may run tasks, the caller included; at least 1. */
  virtual int num_workers() const = 0;

  /** Runs `task(index, worker)` once for every index in [0, num_tasks), then returns.
   *  `worker` is in [0, num_workers()), and no two concurrent tasks share it. `task` must not throw.
   *  Tasks are handed out in increasing order of index; nothing is promised on which worker runs which. */
  virtual void run(int64_t num_tasks, FunctionRef<void(int64_t index, int worker)> task) = 0;
};

}  // namespace dcext
