#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "faulty_source.h"
#include "runtime/thread_pool.h"

namespace dcext::stress {

/** A use of a stream from its begin to its end: panels of pieces are waited for, compared and released by one thread
 *  or by those of a pool, as layers do. */
class Pass {
 public:
  /** What became of it. */
  struct Outcome {
    bool failed = false;  ///< as injected
    bool closed = false;
    int64_t used_nbytes = 0;
  };

  /** Begins all of a unit, or some of its pieces. Borrows everything.
   *  @param pieces   those of the use, which live as long as this. */
  Pass(WeightStream& stream, GuardedSlots& slots, int64_t unit, std::vector<Piece> pieces,
       std::shared_ptr<WeightStream::Use> use, uint64_t seed);
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  /** Panels of all pieces. */
  int64_t num_panels() const { return static_cast<int64_t>(panels_.size()); }

  /** Uses the first `count` panels. May be called once, `use_panel` from any thread.
   *  @param before   called before each wait. */
  void use_panels(int64_t count, int workers, ThreadPool& pool,
                  const std::function<void()>& before);

  /** Ends the use. */
  Outcome end();

 private:
  struct Panel {
    int64_t piece, number, of;
  };
  struct Held {
    std::atomic<int64_t> left{0};   // panels still to be used, or skipped
    std::atomic<int64_t> slot{-1};  // once it was waited for, until it is released
  };

  void use_panel(const Panel& panel, const std::function<void()>& before);
  bool wait(const Panel& panel, const uint8_t** data);
  void compare(const Panel& panel, const uint8_t* data) const;
  void release(int64_t piece);

  WeightStream& stream_;
  GuardedSlots& slots_;
  const int64_t unit_;
  const std::vector<Piece> pieces_;
  const uint64_t seed_;
  std::shared_ptr<WeightStream::Use> use_;
  std::vector<Panel> panels_;
  std::unique_ptr<Held[]> held_;
  std::atomic<bool> failed_{false}, closed_{false};
  std::atomic<int64_t> used_nbytes_{0};
};

}  // namespace dcext::stress
