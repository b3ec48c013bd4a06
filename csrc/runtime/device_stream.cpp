#include "runtime/device_stream.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>

#include "runtime/unit_copier.h"

namespace dcext {
namespace {

using Fill = DeviceSlot::Fill;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Failure closed() { return {Status::kClosed, "stream", -1, 0, 0}; }

Failure bad_argument(const char* field, int64_t expected, int64_t found) {
  return {Status::kBadArgument, field, -1, static_cast<uint64_t>(expected),
          static_cast<uint64_t>(found)};
}

}  // namespace

// The thread for units that must be read or decoded. All but `copier` and `stopped` is guarded by the stream's mutex.
class DeviceStream::Background {
 public:
  Background(Link& link, const DecodeRing& ring) : copier(link, ring) {}

  UnitCopier copier;
  std::atomic<bool> stopped{false};
  std::deque<DeviceSlot*> queue;
  std::thread thread;

  // What is waited for goes first.
  DeviceSlot* next() {
    const auto waited_for = [](const DeviceSlot* slot) { return !slot->users.empty(); };
    auto found = std::find_if(queue.begin(), queue.end(), waited_for);
    if (found == queue.end()) found = queue.begin();
    DeviceSlot* const slot = *found;
    queue.erase(found);
    return slot;
  }
};

// What a thread used last on a stream.
struct DeviceStream::Order {
  LearntOrder::Position position;
  int64_t touched = 0;
};

DeviceStream::DeviceStream(Link& link, std::vector<DeviceUnit> units, const DeviceSlots& slots,
                           const DeviceStreamOptions& options)
    : link_(link),
      units_(std::move(units)),
      slots_(slots),
      options_(options),
      owner_(getpid()),
      learnt_(num_units()) {}

Failure DeviceStream::create(Link& link, std::vector<DeviceUnit> units, const DeviceSlots& slots,
                             const DecodeRing& ring, const DeviceStreamOptions& options,
                             std::unique_ptr<DeviceStream>* stream) {
  if (units.empty()) return bad_argument("number of units", 1, 0);
  if (slots.data.empty()) return bad_argument("number of slots", 1, 0);
  std::unique_ptr<DeviceStream> made(new DeviceStream(link, std::move(units), slots, options));
  const Failure failure = made->prepare(ring);
  if (failure.ok()) *stream = std::move(made);
  return failure;
}

Failure DeviceStream::prepare(const DecodeRing& ring) {
  for (const DeviceUnit& unit : units_) {
    const int64_t nbytes = unit.slot_nbytes();
    if (nbytes < 0) return bad_argument("parts of a unit", 0, nbytes);
    if (nbytes > slots_.slot_nbytes) return bad_argument("slot bytes", nbytes, slots_.slot_nbytes);
    slot_nbytes_.push_back(nbytes);
  }
  Failure failure = eager_.prepare(link_, link_.copy_stream(), slots_.num_slots());
  if (failure.ok()) failure = captured_.prepare(link_, link_.capture_stream(), slots_.num_slots());
  if (!failure.ok()) return failure;
  const auto needs_thread = [](const DeviceUnit& unit) { return unit.needs_thread(); };
  if (!std::any_of(units_.begin(), units_.end(), needs_thread)) return {};
  background_ = std::make_unique<Background>(link_, ring);
  for (const DeviceUnit& unit : units_) {
    if (!background_->copier.fits(unit)) {
      return bad_argument("buffer bytes for a panel", 1, ring.buffer_nbytes);
    }
  }
  background_->thread = std::thread([this] { run_background(); });
  return {};
}

DeviceStream::~DeviceStream() { close(); }

bool DeviceStream::is_usable() const { return getpid() == owner_; }

uint8_t* DeviceStream::address(int64_t unit) const {
  return slots_.data[static_cast<size_t>(unit % slots_.num_slots())];
}

void DeviceStream::close() {
  std::call_once(closing_, [this] {
    {
      const Lock lock(mutex_);
      closed_ = true;
      if (background_ != nullptr) background_->stopped = true;
    }
    changed_.notify_all();
    if (background_ != nullptr && background_->thread.joinable()) background_->thread.join();
    link_.drain();
  });
}

DeviceStreamStatistics DeviceStream::statistics() const {
  const Lock lock(mutex_);
  return statistics_;
}

Failure DeviceStream::begin(int64_t unit, Link::Stream consumer, uint8_t** address) {
  if (unit < 0 || unit >= num_units()) return bad_argument("unit below", num_units(), unit);
  const int64_t began = now_ns();
  uint64_t capture = 0;
  Failure failure = link_.capture_of(consumer, &capture);
  if (!failure.ok()) return failure;
  SlotLane& lane = capture == 0 ? eager_ : captured_;
  DeviceSlot& slot = slot_of(lane, unit);
  {
    Lock lock(mutex_);
    if (capture != 0) {
      if (units_[unit].needs_thread()) {
        return bad_argument("in a capture: units that rest elsewhere than in host memory", 0, 1);
      }
      failure = enter_capture(lock, capture);
      if (!failure.ok()) return failure;
      lane.begun[unit] = true;
    }
    ++statistics_.begins;
    const OrderKey key{std::this_thread::get_id(), consumer};
    learn(key, unit);
    failure = claim(lock, lane, unit, consumer);
    if (failure.ok()) copy_ahead(lane, key);
  }
  // Nobody fills the slot while it is claimed.
  if (failure.ok()) {
    failure = link_.wait(consumer, slot.ready);
    if (!failure.ok()) {
      const Lock lock(mutex_);
      unclaim(lane, slot);
    }
  }
  *address = this->address(unit);
  const Lock lock(mutex_);
  statistics_.stall_ns += now_ns() - began;
  return failure;
}

// Makes the calling thread a user of the unit's slot, its copies enqueued. On failure it is none.
Failure DeviceStream::claim(Lock& lock, SlotLane& lane, int64_t unit, Link::Stream consumer) {
  DeviceSlot& slot = slot_of(lane, unit);
  bool hit = false;
  Failure failure = take(lock, lane, unit, &hit);
  if (!failure.ok()) return failure;
  if (!hit) {
    // What the consumer was given may have written or read the slot: a graph did, or the graph that this is part of
    // will be launched behind something that does.
    if (!trusts(lane) || (lane.capture != 0 && !lane.forked)) {
      failure = lane.add_reader(slot, consumer);
      if (!failure.ok()) return failure;
      lane.forked = true;
    }
  }
  slot.users.push_back(std::this_thread::get_id());
  slot.kept.reset();
  if (!hit) fill(lane, unit);
  slot.ahead = false;
  failure = await_copies(lock, slot);
  if (!failure.ok()) {
    unclaim(lane, slot);
    return failure;
  }
  if (!hit) return {};
  ++statistics_.hits;
  if (lane.capture == 0 && lane.update(slot)) ++statistics_.late;
  return {};
}

// Waits until the slot holds the unit, or may be filled with it.
Failure DeviceStream::take(Lock& lock, SlotLane& lane, int64_t unit, bool* hit) {
  DeviceSlot& slot = slot_of(lane, unit);
  for (;;) {
    if (closed_) return closed();
    if (!broken_.ok()) return broken_;
    *hit = slot.unit == unit;
    if (*hit || (slot.users.empty() && can_fill(slot))) return {};
    if (slot.is_used_here() || lane.capture != 0) {
      return bad_argument("other units in use of the same slot", 0, 1);
    }
    changed_.wait(lock);
  }
}

// Whether nobody is about to fill an unused slot; a fill that has not begun is given up.
bool DeviceStream::can_fill(DeviceSlot& slot) {
  if (slot.fill == Fill::kRunning) return false;
  if (slot.fill == Fill::kQueued) {
    auto& queue = background_->queue;
    queue.erase(std::remove(queue.begin(), queue.end(), &slot), queue.end());
    slot.fill = Fill::kDone;
    slot.forget();
  }
  return true;
}

Failure DeviceStream::await_copies(Lock& lock, DeviceSlot& slot) {
  changed_.wait(lock, [&] { return closed_ || slot.fill == Fill::kDone; });
  return closed_ ? closed() : slot.failure;
}

void DeviceStream::unclaim(SlotLane& lane, DeviceSlot& slot) {
  slot.remove_user();
  const bool lost = !slot.failure.ok() || !trusts(lane);
  if (slot.users.empty() && slot.fill == Fill::kDone && lost) slot.forget();
  changed_.notify_all();
}

void DeviceStream::fill(SlotLane& lane, int64_t unit) {
  DeviceSlot& slot = slot_of(lane, unit);
  slot.unit = unit;
  slot.failure = {};
  slot.under_way = false;
  if (units_[unit].needs_thread()) {
    slot.fill = Fill::kQueued;
    background_->queue.push_back(&slot);
    changed_.notify_all();
    return;
  }
  Failure failure = lane.wait_for_readers(slot);
  if (failure.ok()) failure = copy_host_parts(link_, units_[unit], address(unit), lane.copies);
  if (failure.ok()) failure = link_.record(slot.ready, lane.copies);
  slot.failure = failure;
  slot.under_way = failure.ok();
  if (failure.ok() && lane.capture == 0) statistics_.copied_nbytes += units_[unit].nbytes();
}

void DeviceStream::run_background() {
  Background& background = *background_;
  Lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return closed_ || !background.queue.empty(); });
    if (closed_) return;
    DeviceSlot& slot = *background.next();
    slot.fill = Fill::kRunning;
    const int64_t unit = slot.unit;
    Failure failure = eager_.wait_for_readers(slot);
    lock.unlock();
    if (failure.ok()) {
      failure = background.copier.copy(units_[unit], address(unit), background.stopped);
    }
    lock.lock();
    if (failure.ok()) failure = link_.record(slot.ready, eager_.copies);
    slot.fill = Fill::kDone;
    slot.failure = failure;
    slot.under_way = failure.ok();
    if (failure.ok()) statistics_.copied_nbytes += units_[unit].nbytes();
    changed_.notify_all();
    lock.unlock();
    background.copier.release();
    lock.lock();
  }
}

Failure DeviceStream::end(int64_t unit, Link::Stream consumer) {
  if (unit < 0 || unit >= num_units()) return bad_argument("unit below", num_units(), unit);
  uint64_t capture = 0;
  Failure failure = link_.capture_of(consumer, &capture);
  if (!failure.ok()) return failure;  // the unit stays in use: nothing is written over it
  const Lock lock(mutex_);
  SlotLane& lane = capture == 0 ? eager_ : captured_;
  DeviceSlot& slot = slot_of(lane, unit);
  if (lane.capture != capture || slot.unit != unit || slot.users.empty()) {
    return bad_argument("unit that was begun", slot.unit, unit);
  }
  if (!closed_) {
    failure = lane.add_reader(slot, consumer);
    if (!failure.ok() && capture == 0) broken_ = failure;
  }
  unclaim(lane, slot);
  copy_ahead(lane, {std::this_thread::get_id(), consumer});
  return failure;
}

void DeviceStream::learn(const OrderKey& key, int64_t unit) {
  Order& order = orders_[key];
  order.touched = ++clock_;
  learnt_.learn(&order.position, unit);
  // Who begins nothing while the others go twice through all units has probably ended.
  for (auto it = orders_.begin(); it != orders_.end();) {
    if (clock_ - it->second.touched <= 2 * num_units()) {
      ++it;
      continue;
    }
    keep_nothing(eager_, it->first);
    it = orders_.erase(it);
  }
}

void DeviceStream::keep_nothing(SlotLane& lane, const OrderKey& key) {
  for (DeviceSlot& slot : lane.slots) {
    if (slot.kept == key) slot.kept.reset();
  }
}

// Bytes that are not there yet; in a capture, that nobody waits for yet.
int64_t DeviceStream::ahead_nbytes(SlotLane& lane) {
  int64_t nbytes = 0;
  for (DeviceSlot& slot : lane.slots) {
    if (slot.unit < 0) continue;
    const bool counts =
        lane.capture == 0 ? slot.fill != Fill::kDone || lane.update(slot) : slot.ahead;
    if (counts) nbytes += units_[slot.unit].nbytes();
  }
  return nbytes;
}

// A capture must wait for all that it copies: nothing is copied ahead that it may not begin.
bool DeviceStream::may_copy_ahead(const SlotLane& lane, int64_t last, int64_t next) const {
  if (lane.capture == 0) return !had_capture_;
  return options_.ahead_in_captures && next > last && !lane.begun[next] &&
         !units_[next].needs_thread();
}

// Fills slots with what is expected next, up to the first that is used or kept for another.
void DeviceStream::copy_ahead(SlotLane& lane, const OrderKey& key) {
  const auto order = orders_.find(key);
  if (closed_ || !broken_.ok() || order == orders_.end()) return;
  keep_nothing(lane, key);
  int64_t nbytes = ahead_nbytes(lane);
  std::vector<bool> passed(lane.slots.size(), false);
  LearntOrder::Position position = order->second.position;
  for (;;) {
    const int64_t next = learnt_.expected_after(position);
    if (!may_copy_ahead(lane, position.last, next)) return;
    const auto index = static_cast<size_t>(next % slots_.num_slots());
    if (passed[index]) return;  // needed sooner for another
    passed[index] = true;
    DeviceSlot& slot = lane.slots[index];
    if (slot.unit != next) {
      if (!slot.users.empty() || slot.kept.has_value() || slot.fill == Fill::kRunning) return;
      const int64_t more = units_[next].nbytes();
      if (nbytes > 0 && more > options_.max_ahead_nbytes - nbytes) return;
      can_fill(slot);
      fill(lane, next);
      slot.ahead = true;
      nbytes += more;
    }
    if (slot.users.empty()) slot.kept = key;
    position = position.after(next);
  }
}

Failure DeviceStream::join(Link::Stream consumer) {
  uint64_t capture = 0;
  Failure failure = link_.capture_of(consumer, &capture);
  const Lock lock(mutex_);
  if (!failure.ok() || capture == 0 || captured_.capture != capture) return failure;
  for (DeviceSlot& slot : captured_.slots) {
    if (!slot.ahead) continue;
    failure = link_.wait(consumer, slot.ready);
    if (!failure.ok()) return failure;
    slot.ahead = false;
  }
  return {};
}

Failure DeviceStream::enter_capture(Lock& lock, uint64_t id) {
  if (captured_.capture == id) return {};
  had_capture_ = true;
  const Failure failure = forget_outside_captures(lock);
  if (!failure.ok()) return failure;
  if (captured_.capture != id) captured_.start_capture(id, num_units());
  return {};
}

// Copies ahead that are under way when a graph is replayed would overwrite its slots: they are waited for, once a
// capture.
Failure DeviceStream::forget_outside_captures(Lock& lock) {
  const auto all_free = [this] {
    return std::all_of(eager_.slots.begin(), eager_.slots.end(),
                       [this](DeviceSlot& slot) { return !slot.users.empty() || can_fill(slot); });
  };
  changed_.wait(lock, [&] { return closed_ || all_free(); });
  for (DeviceSlot& slot : eager_.slots) {
    if (!slot.users.empty() || slot.fill != Fill::kDone) continue;
    slot.under_way = false;
    slot.forget();
  }
  return closed_ ? closed() : link_.drain();
}

}  // namespace dcext
