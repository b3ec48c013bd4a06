#include "runtime/weight_stream.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>

namespace dcext {
namespace {

// Of the slots, one part must be free before a thread is woken to read ahead. One that is awake takes every free slot.
constexpr int64_t kWakeShare = 4;
// After so many uses without a stall the disk keeps up, and reads have time to keep off the processor of who begins them. Where
// they are waited for they take any: on two processors, a fast disk lost a sixth of its rate otherwise.
constexpr int64_t kCalmUses = 64;

enum class State { kUnread, kReading, kReady, kHeld, kFailed, kReleased };

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

// A unit that is used or expected to be. All but the constants is guarded by the stream's mutex.
class WeightStream::Use {
 public:
  struct Part {
    Piece piece;
    State state = State::kUnread;
    int waiters = 0;
    int64_t slot = -1;
    const uint8_t* data = nullptr;
    Failure failure;

    bool is_over() const {
      return state == State::kReady || state == State::kHeld || state == State::kFailed;
    }
  };

  Use(int64_t the_unit, bool may_be_expected) : unit(the_unit), expectable(may_be_expected) {}

  const int64_t unit;
  const bool expectable;  // nobody knows ahead which pieces a look-up needs
  std::vector<Part> parts;
  size_t next_unread = 0;
  bool dropped = false;
  std::condition_variable changed;

  bool all_read() const { return next_unread == parts.size(); }
  // Whether a slot will come back to the stream before the next unread part is waited for.
  bool holds_earlier_slot() const {
    return std::any_of(parts.begin(), parts.begin() + static_cast<int64_t>(next_unread),
                       [](const Part& part) { return part.slot >= 0; });
  }
  // -1: there is none.
  int64_t first_waited() const {
    for (size_t i = next_unread; i < parts.size(); ++i) {
      if (parts[i].state == State::kUnread && parts[i].waiters != 0) return static_cast<int64_t>(i);
    }
    return -1;
  }
  // Of those that may be taken back: who waited for the others is about to hold them.
  Part* last_ready() {
    const auto found = std::find_if(parts.rbegin(), parts.rend(), [](const Part& part) {
      return part.state == State::kReady && part.waiters == 0;
    });
    return found == parts.rend() ? nullptr : &*found;
  }
  // Whether no slot comes back from it, nor is about to, unless someone waits for its parts.
  bool is_idle() const {
    return std::none_of(parts.begin(), parts.end(), [](const Part& part) {
      return part.state == State::kReading || part.state == State::kHeld ||
             (part.state == State::kReady && part.waiters != 0);
    });
  }
};

// What a thread used last and is expected to use next.
struct WeightStream::Order {
  LearntOrder::Position position;
  std::deque<UsePtr> expected;
  int64_t touched = 0;
};

WeightStream::WeightStream(std::vector<std::vector<Piece>> units, SlotMemory slots,
                           ReadThreads& threads)
    : units_(std::move(units)),
      slots_(slots),
      threads_(threads),
      owner_(getpid()),
      learnt_(num_units()) {
  for (int64_t slot = slots_.num_slots; slot-- > 0;) free_slots_.push_back(slot);
  threads_.attach(this);
}

WeightStream::~WeightStream() {
  if (is_usable()) threads_.detach(this);
}

bool WeightStream::is_usable() const { return getpid() == owner_; }

WeightStream::UsePtr WeightStream::make_use(int64_t unit) const {
  UsePtr use = std::make_shared<Use>(unit, true);
  for (const Piece& piece : units_[unit]) {
    use->parts.emplace_back();
    use->parts.back().piece = piece;
  }
  return use;
}

WeightStream::UsePtr WeightStream::begin(int64_t unit) {
  UsePtr use;
  bool more, calm;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++statistics_.uses;
    calm = ++calm_uses_ > kCalmUses;
    Order& order = order_of_this_thread();
    while (!order.expected.empty() && use == nullptr) {
      // Expected further on: what lies between was skipped. Not expected at all: nothing of it is worth keeping.
      UsePtr first = std::move(order.expected.front());
      order.expected.pop_front();
      if (first->unit == unit) {
        use = std::move(first);
      } else {
        drop(first);
      }
    }
    if (use == nullptr) use = make_use(unit);
    learnt_.learn(&order.position, unit);
    active_.push_back(use);
    expect_more(order);
    drop_idle_orders();
    more = has_enough_work();
  }
  threads_.keep_off(calm ? sched_getcpu() : -1);
  if (more) threads_.wake(this);
  return use;
}

WeightStream::UsePtr WeightStream::begin_some(int64_t unit, const std::vector<int64_t>& pieces) {
  UsePtr use = std::make_shared<Use>(unit, false);
  for (const int64_t index : pieces) {
    use->parts.emplace_back();
    use->parts.back().piece = units_[unit][index];
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++statistics_.uses;
    active_.push_back(use);
  }
  threads_.wake(this);
  return use;
}

WeightStream::Order& WeightStream::order_of_this_thread() {
  Order& order = orders_[std::this_thread::get_id()];
  order.touched = ++clock_;
  return order;
}

// Expects as much as all slots hold; pieces get slots one by one, so that more would never be read ahead.
void WeightStream::expect_more(Order& order) {
  if (closed_) return;
  LearntOrder::Position position = order.position;
  int64_t pieces = 0;
  for (const UsePtr& use : order.expected) {
    position = position.after(use->unit);
    pieces += static_cast<int64_t>(use->parts.size());
  }
  // A unit without pieces would go on for ever.
  for (int64_t i = 0; pieces < slots_.num_slots && i < num_units(); ++i) {
    const int64_t next = learnt_.expected_after(position);
    order.expected.push_back(make_use(next));
    pieces += static_cast<int64_t>(units_[next].size());
    position = position.after(next);
  }
}

// A thread that begins nothing while the others go twice through the model has probably ended.
void WeightStream::drop_idle_orders() {
  for (auto it = orders_.begin(); it != orders_.end();) {
    if (clock_ - it->second.touched <= 2 * num_units()) {
      ++it;
      continue;
    }
    for (const UsePtr& use : it->second.expected) drop(use);
    it = orders_.erase(it);
  }
}

// Gives back what a use holds; reads under way give theirs back when they end.
void WeightStream::drop(const UsePtr& use) {
  use->dropped = true;
  use->next_unread = use->parts.size();
  for (Use::Part& part : use->parts) {
    if (part.state != State::kReady && part.state != State::kHeld) continue;
    int64_t& nbytes =
        part.state == State::kHeld ? statistics_.used_nbytes : statistics_.dropped_nbytes;
    nbytes += part.piece.nbytes;
    part.state = State::kReleased;
    free_slot(part.slot);
    part.slot = -1;
  }
}

void WeightStream::free_slot(int64_t slot) { free_slots_.push_back(slot); }

Failure WeightStream::wait(Use& use, int64_t index, const uint8_t** data) {
  std::unique_lock<std::mutex> lock(mutex_);
  Use::Part& part = use.parts[index];
  const auto is_over = [&] { return closed_ || part.is_over(); };
  ++statistics_.pieces;
  if (!is_over()) {
    ++statistics_.stalls;
    if (use.expectable) {
      calm_uses_ = 0;
      threads_.keep_off(-1);
    }
    count_time(&statistics_.stall_ns, waiters_, waiters_ + 1, &waiting_since_);
    ++waiters_;
    ++part.waiters;
    // It may now take a slot that it could not take before. No one who has the threads' mutex asks for this one.
    if (part.state == State::kUnread) threads_.wake(this);
    use.changed.wait(lock, is_over);
    --part.waiters;
    count_time(&statistics_.stall_ns, waiters_, waiters_ - 1, &waiting_since_);
    --waiters_;
  }
  if (closed_) return Failure{Status::kClosed, "stream", -1, 0, 0};
  if (part.state == State::kFailed) return part.failure;
  part.state = State::kHeld;
  *data = part.data;
  return {};
}

bool WeightStream::is_over(const Use& use, int64_t index) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return closed_ || use.parts[index].is_over();
}

void WeightStream::release(Use& use, int64_t index) {
  bool more;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Use::Part& part = use.parts[index];
    if (part.state != State::kHeld) return;
    statistics_.used_nbytes += part.piece.nbytes;
    part.state = State::kReleased;
    free_slot(part.slot);
    part.slot = -1;
    more = has_enough_work();
  }
  if (more) threads_.wake(this);
}

void WeightStream::end(const UsePtr& use) {
  bool more;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop(use);
    active_.erase(std::remove(active_.begin(), active_.end(), use), active_.end());
    more = has_enough_work();
  }
  if (more) threads_.wake(this);
}

void WeightStream::close() {
  if (!is_usable()) return;  // the parent's threads may hold the lock for ever
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  for (auto& [thread, order] : orders_) {
    for (const UsePtr& use : order.expected) drop(use);
    order.expected.clear();
  }
  for (const UsePtr& use : active_) use->changed.notify_all();
}

StreamStatistics WeightStream::statistics() const {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (is_usable()) lock.lock();  // else nothing changes any more, and the lock may be held for ever
  StreamStatistics found = statistics_;
  // What goes on now counts too: where the disk is never idle, its time would not be counted for long.
  if (readers_ > 0) found.reading_ns += now_ns() - reading_since_;
  if (waiters_ > 0) found.stall_ns += now_ns() - waiting_since_;
  return found;
}

// Adds to a total the time during which a count was above zero.
void WeightStream::count_time(int64_t* total, int before, int after, int64_t* since) {
  if (before == 0 && after == 1) *since = now_ns();
  if (before == 1 && after == 0) *total += now_ns() - *since;
}

// Whether a thread is to be woken: someone will wait for a read, or several slots are free for what is read ahead. Where
// computing takes all processors, one that wakes for every small layer disturbs it by 0.1 ms each time.
bool WeightStream::has_enough_work() const {
  if (closed_) return false;
  const auto unread = [](const UsePtr& use) { return !use->all_read(); };
  const bool demanded = std::any_of(active_.begin(), active_.end(), unread);
  if (demanded) return true;
  const int64_t enough = std::max<int64_t>(1, slots_.num_slots / kWakeShare);
  if (static_cast<int64_t>(free_slots_.size()) < enough) return false;
  return std::any_of(orders_.begin(), orders_.end(), [&](const auto& entry) {
    return std::any_of(entry.second.expected.begin(), entry.second.expected.end(), unread);
  });
}

// Takes the last piece that is there back from a use, to be read again.
bool WeightStream::take_back(Use& use) {
  Use::Part* const part = use.last_ready();
  if (part == nullptr) return false;
  statistics_.dropped_nbytes += part->piece.nbytes;
  part->state = State::kUnread;
  free_slot(part->slot);
  part->slot = -1;
  use.next_unread = std::min(use.next_unread, static_cast<size_t>(part - use.parts.data()));
  return true;
}

// Makes a slot free for a user who has none: from what any order expects last.
bool WeightStream::take_from_expected() {
  Use* victim = nullptr;
  size_t distance = 0;
  for (auto& [thread, order] : orders_) {
    for (size_t i = order.expected.size(); i-- > 0;) {
      if (order.expected[i]->last_ready() == nullptr) continue;
      if (victim == nullptr || i >= distance) {
        victim = order.expected[i].get();
        distance = i;
      }
      break;
    }
  }
  return victim != nullptr && take_back(*victim);
}

// Makes a slot free that no user will give back by itself: from the use that was read for last. Without this, users
// stop for ever when all slots are full for one who has begun and, before it waits, queues for what they work with; or
// with pieces that nobody will wait for since their pass has failed.
bool WeightStream::take_from_idle() {
  return std::any_of(active_.rbegin(), active_.rend(),
                     [&](const UsePtr& use) { return use->is_idle() && take_back(*use); });
}

bool WeightStream::make_room(Use& use, bool waited) {
  // What is read may lie before other pieces of the same use that are there: those give way too.
  if (!use.holds_earlier_slot() && (take_from_expected() || take_back(use))) return true;
  return waited && take_from_idle();
}

// The next read: for a user who waits, in turns; for one who has begun, in turns; else for what is expected, in turns.
bool WeightStream::pick(UsePtr* use, int64_t* index) {
  if (closed_) return false;
  for (const bool waited : {true, false}) {
    for (size_t i = 0; i < active_.size(); ++i) {
      UsePtr candidate = active_[i];
      if (candidate->all_read()) continue;
      *index = waited ? candidate->first_waited() : static_cast<int64_t>(candidate->next_unread);
      if (*index < 0 || (free_slots_.empty() && !make_room(*candidate, waited))) continue;
      active_.erase(active_.begin() + static_cast<int64_t>(i));
      active_.push_back(candidate);
      *use = std::move(candidate);
      return true;
    }
  }
  return !free_slots_.empty() && pick_expected(use, index);
}

// Orders take turns by how many slots they hold.
bool WeightStream::pick_expected(UsePtr* use, int64_t* index) {
  int64_t least = INT64_MAX;
  for (auto& [thread, order] : orders_) {
    int64_t held = 0;
    UsePtr first;
    for (const UsePtr& candidate : order.expected) {
      for (const Use::Part& part : candidate->parts) held += part.slot >= 0 ? 1 : 0;
      if (first == nullptr && !candidate->all_read()) first = candidate;
    }
    if (first == nullptr || held >= least) continue;
    least = held;
    *index = static_cast<int64_t>(first->next_unread);
    *use = std::move(first);
  }
  return least != INT64_MAX;
}

bool WeightStream::read_one() {
  UsePtr use;
  int64_t index;
  bool more;
  std::unique_lock<std::mutex> lock(mutex_);
  if (!pick(&use, &index)) return false;
  Use::Part& part = use->parts[index];
  part.state = State::kReading;
  part.slot = free_slots_.back();
  free_slots_.pop_back();
  // A piece that was taken back may lie before others that are still there.
  while (!use->all_read() && use->parts[use->next_unread].state != State::kUnread) {
    ++use->next_unread;
  }
  const int64_t used = slots_.num_slots - static_cast<int64_t>(free_slots_.size());
  statistics_.peak_slots = std::max(statistics_.peak_slots, used);
  count_time(&statistics_.reading_ns, readers_, readers_ + 1, &reading_since_);
  ++readers_;
  more = has_enough_work();
  const Piece piece = part.piece;
  uint8_t* const slot = slots_.data + part.slot * slots_.slot_nbytes;
  lock.unlock();
  if (more) threads_.wake(this);

  const uint8_t* data = nullptr;
  const Failure failure = piece.source->read(piece.offset, piece.nbytes, slot, &data);

  lock.lock();
  count_time(&statistics_.reading_ns, readers_, readers_ - 1, &reading_since_);
  --readers_;
  if (failure.ok()) statistics_.read_nbytes += piece.nbytes;
  part.data = data;
  part.failure = failure;
  part.state = failure.ok() ? State::kReady : State::kFailed;
  if (use->dropped || !failure.ok()) {
    if (failure.ok()) statistics_.dropped_nbytes += piece.nbytes;
    if (use->dropped) part.state = State::kReleased;
    free_slot(part.slot);
    part.slot = -1;
  }
  use->changed.notify_all();
  return true;
}

}  // namespace dcext
