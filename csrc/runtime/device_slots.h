#pragma once

#include <cstdint>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/link.h"

namespace dcext {

/** Whose order of units it is. */
using OrderKey = std::pair<std::thread::id, Link::Stream>;

/** What a slot of a device holds, and what must happen before it may hold something else. */
struct DeviceSlot {
  enum class Fill {
    kDone,     ///< copies are enqueued, or failed
    kQueued,   ///< a thread will enqueue them
    kRunning,  ///< a thread enqueues them
  };
  struct Reader {
    Link::Stream stream;
    Link::Event read;
  };

  int64_t unit = -1;             ///< whose bytes lie in it, or will, or failed to
  Link::Event ready = nullptr;   ///< recorded after the copies
  Fill fill = Fill::kDone;       ///< of `unit`
  Failure failure;               ///< of the fill
  bool under_way = false;        ///< copies are not known to be done
  bool ahead = false;            ///< not begun since it was filled
  std::optional<OrderKey> kept;  ///< for whom it was filled ahead
  std::vector<std::thread::id> users;
  std::vector<Reader> readers;  ///< since it was filled

  bool is_used_here() const;
  void remove_user();
  void forget();  ///< what it holds, not who reads it
};

/** The slots as they are outside captures, or in one. */
struct SlotLane {
  Link* link = nullptr;
  Link::Stream copies = nullptr;
  std::vector<DeviceSlot> slots;
  std::vector<Link::Event> spare;
  uint64_t capture = 0;     ///< 0: none
  bool forked = false;      ///< `copies` is part of the capture
  std::vector<bool> begun;  ///< units, in the capture

  Failure prepare(Link& the_link, Link::Stream the_copies, int64_t num_slots);
  ~SlotLane();

  /** A fill of the slot is to wait for what `stream` has been given. */
  Failure add_reader(DeviceSlot& slot, Link::Stream stream);

  /** Has `copies` wait for all readers of a slot. */
  Failure wait_for_readers(DeviceSlot& slot);

  /** Whether copies to a slot may still be under way. */
  bool update(DeviceSlot& slot);

  void start_capture(uint64_t id, int64_t num_units);
};

}  // namespace dcext
