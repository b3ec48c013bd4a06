#pragma once

#include <vector>

#include "format/payload.h"

namespace dcext {

/** Brings panels of a payload to a layer, piece by piece, while it runs. */
class PanelSource {
 public:
  virtual ~PanelSource() = default;

  /** Before a pass over all panels, in order. */
  virtual void begin() = 0;

  /** Before a pass over some panels, ascending. */
  virtual void begin_some(const std::vector<int64_t>& panels) = 0;

  /** Blocks until a panel's chunks are there. Called once per panel and pass, from any thread.
   *  @param view   receives the payload with the panel's chunks (those of other panels may be missing).
   *  @return kOk, or why they never will be. */
  virtual Failure acquire(int64_t panel, PayloadView* view) = 0;

  /** What loading a payload checks of a chunk beside its checksum, for one that was acquired and whose checksum holds;
   *  cheap but for the first time. From any thread.
   *  @return kOk or kCorrupt. */
  virtual Failure check_format(const PayloadView& view, int64_t chunk) = 0;

  /** After each successful acquire: the panel is not read any more in this pass. Instead of an acquire: it never is.
   *  Whoever leaves panels out must say so, since what they share a piece with would stay held for others to wait for. */
  virtual void release(int64_t panel) = 0;

  /** After a pass, complete or not. */
  virtual void end() = 0;
};

}  // namespace dcext
