#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/learnt_order.h"
#include "runtime/read_source.h"
#include "runtime/read_threads.h"

namespace dcext {

/** What is read in one go. */
struct Piece {
  ReadSource* source = nullptr;
  int64_t offset = 0;
  int64_t nbytes = 0;
};

/** Memory that pieces are read into, one per slot. */
struct SlotMemory {
  uint8_t* data = nullptr;  ///< page-aligned
  int64_t slot_nbytes =
      0;  ///< a multiple of the page size, at least the largest piece + ReadSource::kSlackNbytes
  int64_t num_slots = 0;  ///< at least 1
};

/** What a stream has done so far. Times are wall-clock nanoseconds. */
struct StreamStatistics {
  int64_t read_nbytes = 0;     ///< of pieces, alignment not counted
  int64_t used_nbytes = 0;     ///< of those, handed to a user
  int64_t dropped_nbytes = 0;  ///< of those, read for nothing: the order changed
  int64_t uses = 0;            ///< units begun
  int64_t pieces = 0;          ///< pieces waited for
  int64_t stalls = 0;          ///< of those, not there yet
  int64_t stall_ns = 0;        ///< time in which at least one user waited
  int64_t reading_ns = 0;      ///< time in which at least one read was under way
  int64_t peak_slots = 0;      ///< most slots in use at a time
};

/** Brings weights from where they rest, in the order in which they are used, ahead of their use.
 *
 *  A model is a list of units (layers), a unit a list of pieces. Every thread that uses units has an order of its own,
 *  expected at first to be that of the list and learnt from then on: what followed the last two units follows them
 *  again. Another order costs reads, never correctness. Slots go to what is waited for first, then to what is expected
 *  next; users take turns, and so do orders. Nothing is shared between users: a unit that two threads use is read twice.
 *
 *  Threading: all functions may be called from any thread; those of one Use too. */
class WeightStream final : public ReadThreads::Client {
 public:
  class Use;

  /** Borrows sources, slots and threads, which must outlive it. */
  WeightStream(std::vector<std::vector<Piece>> units, SlotMemory slots, ReadThreads& threads);

  /** Waits for reads under way. There must be no Use. */
  ~WeightStream() override;

  /** Begins to use all pieces of a unit, in order: each must be waited for in an order close to that, since later ones
   *  may get a slot only when earlier ones are released. Who holds a piece must release it without waiting for another;
   *  one that is there and that nobody waits for may go again, for whoever waits. */
  std::shared_ptr<Use> begin(int64_t unit);

  /** The same for some of its pieces, ascending, as look-ups need them; the order of units is not touched. */
  std::shared_ptr<Use> begin_some(int64_t unit, const std::vector<int64_t>& pieces);

  /** Blocks until piece `index` (of those that the use began with) is there.
   *  @param data   receives where it lies, until it is released.
   *  @return kOk, what the read returned, or kClosed. */
  Failure wait(Use& use, int64_t index, const uint8_t** data);

  /** Whether `wait` for the piece would return at once. Who holds slots and cannot release them soon waits for no other. */
  bool is_over(const Use& use, int64_t index) const;

  /** Gives the slot of a piece back. It must have been waited for successfully. */
  void release(Use& use, int64_t index);

  /** Ends a use; pieces that were not waited for are dropped. No other function may be inside the use. */
  void end(const std::shared_ptr<Use>& use);

  /** Drops all that was prefetched and lets all users, waiting or to come, fail with kClosed. */
  void close();

  /** False in a child of the process that made the stream, where there are no threads to read: use nothing then but
   *  `close`, which does nothing, and `statistics`, which are those of the moment of the fork. */
  bool is_usable() const;

  const std::vector<Piece>& pieces(int64_t unit) const { return units_[unit]; }
  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }
  StreamStatistics statistics() const;

  bool read_one() override;

 private:
  struct Order;
  using UsePtr = std::shared_ptr<Use>;

  UsePtr make_use(int64_t unit) const;
  Order& order_of_this_thread();
  void expect_more(Order& order);
  void drop(const UsePtr& use);
  void drop_idle_orders();
  void free_slot(int64_t slot);
  bool pick(UsePtr* use, int64_t* index);
  bool pick_expected(UsePtr* use, int64_t* index);
  bool take_back(Use& use);
  bool take_from_expected();
  bool take_from_idle();
  bool make_room(Use& use, bool waited);
  bool has_enough_work() const;
  void count_time(int64_t* total, int before, int after, int64_t* since);

  const std::vector<std::vector<Piece>> units_;
  const SlotMemory slots_;
  ReadThreads& threads_;
  const pid_t owner_;

  mutable std::mutex mutex_;  // guards all below
  std::vector<int64_t> free_slots_;
  std::deque<UsePtr> active_;  // the front one's turn is next
  std::map<std::thread::id, Order> orders_;
  LearntOrder learnt_;
  int64_t clock_ = 0;      // uses begun, by which idle orders are told
  int64_t calm_uses_ = 0;  // begun since one stalled that could have been expected
  int readers_ = 0, waiters_ = 0;
  int64_t reading_since_ = 0, waiting_since_ = 0;
  bool closed_ = false;
  StreamStatistics statistics_;
};

}  // namespace dcext
