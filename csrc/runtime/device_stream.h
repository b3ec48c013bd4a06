#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/device_slots.h"
#include "runtime/device_unit.h"
#include "runtime/learnt_order.h"
#include "runtime/link.h"

namespace dcext {

/** Memory of a device that units are copied to. Unit u goes to slot u % num_slots: always to the same address. */
struct DeviceSlots {
  std::vector<uint8_t*> data;  ///< two or more, for one to be filled while another is used
  int64_t slot_nbytes = 0;

  int64_t num_slots() const { return static_cast<int64_t>(data.size()); }
};

struct DeviceStreamOptions {
  /** Of copies ahead of use that are not done yet. One unit is always copied ahead. */
  int64_t max_ahead_nbytes = INT64_MAX;
  /** Whether captures copy ahead. See DeviceStream::join. */
  bool ahead_in_captures = true;
};

/** What a stream has done so far. */
struct DeviceStreamStatistics {
  int64_t begins = 0;
  int64_t hits = 0;           ///< of those, the bytes were in the slot or on their way
  int64_t late = 0;           ///< of those, still on their way
  int64_t copied_nbytes = 0;  ///< enqueued outside captures, ahead of use or not
  int64_t stall_ns = 0;       ///< time that threads spent in `begin`
};

/** Brings units to slots of a device ahead of their use, ordered by events: the host does not wait for the device.
 *
 *  A user begins a unit on a stream of the device, enqueues what reads it, and ends it there. Every pair of thread and
 *  stream has an order of its own, expected at first to be that of the list and learnt from then on; what is expected
 *  next is copied as soon as its slot is free. Another order costs copies, never correctness. Units that need a thread
 *  (from disk, or decoded on the host) are brought by one of the stream's own; a failure there is reported to whoever
 *  begins the unit, who may try again.
 *
 *  `begin` blocks while another thread has another unit of the same slot in use, and until the copies of a unit that
 *  needs a thread are enqueued. A thread that has several units in use must begin them in ascending order of slots if
 *  others do the same, and never two of one slot (kBadArgument).
 *
 *  Captures (CUDA graphs): what is begun on a stream that is being captured is copied by copies in the capture, on a
 *  stream that forks from it and joins it again. A capture trusts no bytes from before it, and since replays overwrite
 *  slots at any time, nothing outside captures is copied ahead once there was one: `begin` then copies in the order of
 *  its stream, each time. Replays and other uses of one DeviceStream must be ordered by their caller, as on one stream.
 *  Units that need a thread refuse to be captured (kBadArgument).
 *
 *  Threading: all functions may be called from any thread. */
class DeviceStream {
 public:
  /** Borrows all that it is given, which must outlive it.
   *  @param ring   may be empty where nothing is decoded.
   *  @param stream   receives the new one.
   *  @return kOk, kBadArgument, or what the link returned. */
  static Failure create(Link& link, std::vector<DeviceUnit> units, const DeviceSlots& slots,
                        const DecodeRing& ring, const DeviceStreamOptions& options,
                        std::unique_ptr<DeviceStream>* stream);

  /** Closes. No other function may be inside. */
  ~DeviceStream();
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  /** What `consumer` is given from now on, until `end`, finds the unit's bytes at `address`.
   *  @return kOk, kBadArgument, kClosed, or why the bytes are missing; only after kOk must `end` follow. */
  Failure begin(int64_t unit, Link::Stream consumer, uint8_t** address);

  /** All that reads the unit has been enqueued on `consumer`, or on what `consumer` waits for. */
  Failure end(int64_t unit, Link::Stream consumer);

  /** Has a stream that is being captured wait for all that was copied ahead. A capture that ends elsewhere than the
   *  order expects needs it before its end, as CUDA refuses captures with work that nobody waits for; one that goes
   *  through all units, or to the last of the list, does not. Outside captures it does nothing. */
  Failure join(Link::Stream consumer);

  /** Lets all who begin, waiting or to come, fail with kClosed; waits for copies under way. What readers that are
   *  enqueued read stays as it is. Graphs copy from where units rest: they must not be replayed once that is gone. */
  void close();

  /** False in a child of the process that made the stream: use nothing then, nor destroy it. */
  bool is_usable() const;

  uint8_t* address(int64_t unit) const;
  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }
  int64_t nbytes(int64_t unit) const { return slot_nbytes_[unit]; }
  DeviceStreamStatistics statistics() const;

 private:
  class Background;
  struct Order;
  using Lock = std::unique_lock<std::mutex>;

  DeviceStream(Link& link, std::vector<DeviceUnit> units, const DeviceSlots& slots,
               const DeviceStreamOptions& options);
  Failure prepare(const DecodeRing& ring);

  Failure claim(Lock& lock, SlotLane& lane, int64_t unit, Link::Stream consumer);
  Failure take(Lock& lock, SlotLane& lane, int64_t unit, bool* hit);
  Failure await_copies(Lock& lock, DeviceSlot& slot);
  void unclaim(SlotLane& lane, DeviceSlot& slot);
  void fill(SlotLane& lane, int64_t unit);
  bool can_fill(DeviceSlot& slot);
  void copy_ahead(SlotLane& lane, const OrderKey& key);
  bool may_copy_ahead(const SlotLane& lane, int64_t last, int64_t next) const;
  int64_t ahead_nbytes(SlotLane& lane);
  void learn(const OrderKey& key, int64_t unit);
  void keep_nothing(SlotLane& lane, const OrderKey& key);
  void run_background();

  Failure enter_capture(Lock& lock, uint64_t id);
  Failure forget_outside_captures(Lock& lock);
  /** Whether slots that nobody uses still hold what they were filled with. */
  bool trusts(const SlotLane& lane) const { return &lane == &captured_ || !had_capture_; }
  DeviceSlot& slot_of(SlotLane& lane, int64_t unit) const {
    return lane.slots[static_cast<size_t>(unit % slots_.num_slots())];
  }

  Link& link_;
  const std::vector<DeviceUnit> units_;
  const DeviceSlots slots_;
  const DeviceStreamOptions options_;
  const pid_t owner_;
  std::vector<int64_t> slot_nbytes_;
  std::once_flag closing_;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  SlotLane eager_, captured_;
  LearntOrder learnt_;
  std::map<OrderKey, Order> orders_;
  int64_t clock_ = 0;  // units begun, by which idle orders are told
  bool had_capture_ = false;
  bool closed_ = false;
  Failure broken_;  // readers are unknown: no slot may be filled any more
  DeviceStreamStatistics statistics_;

  std::unique_ptr<Background> background_;  // last: its thread uses all above
};

}  // namespace dcext
