#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "runtime/device_unit.h"
#include "runtime/link.h"

namespace dcext {

/** Gives a link's copy stream the copies that fill a slot, and waits where bytes must be read or decoded first.
 *  Threading: one thread. */
class UnitCopier {
 public:
  UnitCopier(Link& link, const DecodeRing& ring);
  /** All copies must be done. */
  ~UnitCopier();
  UnitCopier(const UnitCopier&) = delete;
  UnitCopier& operator=(const UnitCopier&) = delete;

  /** Whether the ring can decode a unit's payloads. */
  bool fits(const DeviceUnit& unit) const;

  /** Returns when all copies are enqueued.
   *  @param stopped   makes it give up with kClosed, after the piece that it is at.
   *  @return kOk, kClosed, or why bytes are missing; copies of others may have been enqueued then. */
  Failure copy(const DeviceUnit& unit, uint8_t* slot, const std::atomic<bool>& stopped);

  /** Gives back what copies that were enqueued read, as soon as they are done. To be called after `copy`. */
  void release();

 private:
  struct Held {
    int64_t index;
    Link::Event copied;
  };
  struct Buffer {
    uint8_t* data = nullptr;
    Link::Event copied = nullptr;  // never recorded: free
  };

  Failure copy_from_disk(const DeviceUnit& unit, uint8_t* slot, const std::atomic<bool>& stopped);
  Failure copy_piece(int64_t index, const uint8_t* data, int64_t nbytes, uint8_t* dst);
  Failure decode(const DeviceUnit::DecodedPart& part, uint8_t* slot,
                 const std::atomic<bool>& stopped);
  Failure next_buffer(Buffer** buffer);
  int64_t rows_of_buffer(const PayloadView& payload) const;
  bool release_first(bool must_wait);

  Link& link_;
  const DecodeRing ring_;
  std::vector<Buffer> buffers_;
  size_t next_ = 0;

  WeightStream* disk_ = nullptr;
  std::shared_ptr<WeightStream::Use> use_;
  std::deque<Held> held_;  // pieces whose copies are under way
  std::vector<Link::Event> spare_;
};

/** Enqueues copies of the parts in host memory. */
Failure copy_host_parts(Link& link, const DeviceUnit& unit, uint8_t* slot, Link::Stream stream);

}  // namespace dcext
