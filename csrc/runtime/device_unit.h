#pragma once

#include <cstdint>
#include <vector>

#include "base/parallel.h"
#include "format/payload.h"
#include "runtime/weight_stream.h"

namespace dcext {

/** What travels to a device in one go, such as a layer's payload followed by its seek index: parts that rest in
 *  different places, each with where it shall lie. Everything is borrowed. */
struct DeviceUnit {
  /** Bytes in host memory, pinned if the link is to copy without waiting. */
  struct HostPart {
    const uint8_t* data = nullptr;
    int64_t nbytes = 0;
    int64_t offset = 0;  ///< in the slot
  };

  /** A payload in host memory that is decoded there. It has been verified. */
  struct DecodedPart {
    PayloadView payload;
    int64_t offset = 0;  ///< in the slot, of rows * cols weights

    int64_t nbytes() const {
      return static_cast<int64_t>(payload.layout().rows * payload.layout().cols);
    }
  };

  std::vector<HostPart> host;
  std::vector<DecodedPart> decoded;
  WeightStream* disk = nullptr;  ///< or null: nothing comes from there
  int64_t disk_unit = 0;
  std::vector<int64_t> disk_offsets;  ///< in the slot, of each piece of `disk_unit`

  /** Bytes of the slot up to the end of the last part; -1 where parts are negative or of the wrong number. */
  int64_t slot_nbytes() const;

  /** Bytes that travel. */
  int64_t nbytes() const;

  /** Whether a thread must read or decode before the device can copy. */
  bool needs_thread() const { return disk != nullptr || !decoded.empty(); }
};

/** Pinned buffers that weights are decoded into on their way. */
struct DecodeRing {
  uint8_t* data = nullptr;
  int64_t buffer_nbytes = 0;  ///< at least one panel of any payload
  int64_t num_buffers = 0;    ///< two or more, for the link to copy one while the next is decoded
  Executor* executor = nullptr;
};

}  // namespace dcext
