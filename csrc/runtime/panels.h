#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "codec/payload_decoder.h"
#include "gemm/int8_gemm.h"
#include "runtime/panel_source.h"

namespace dcext {

// What all passes over the panels of a payload share, whatever they compute.

/** The first failure of a parallel loop over panels, by chunk. Threading: `record` and `before` from any thread. */
class FailureSlot {
 public:
  void record(const Failure& failure);
  /** After the loop. */
  const Failure& get() const { return failure_; }
  /** Inside it: whether a chunk need not be looked at, since an earlier one has failed. */
  bool before(int64_t chunk) const { return lowest_.load(std::memory_order_relaxed) < chunk; }

 private:
  std::mutex mutex_;
  Failure failure_;
  std::atomic<int64_t> lowest_{INT64_MAX};
};

/** A panel's chunks, held while this lives: where they rest, or as a source brings them. */
class HeldPanel {
 public:
  /** @param source   null where `weight` has its chunks. */
  HeldPanel(const PayloadView& weight, PanelSource* source, int64_t index);
  ~HeldPanel();
  HeldPanel(const HeldPanel&) = delete;
  HeldPanel& operator=(const HeldPanel&) = delete;

  /** Why the panel is not here; nothing else may be asked then. */
  const Failure& failure() const { return failure_; }
  const PayloadView& view() const { return view_; }
  int64_t index() const { return index_; }
  /** Whether checksums are still to be compared. What rests was verified when it was loaded. */
  Verify verify() const { return static_cast<Verify>(source_ != nullptr); }
  /** What loading checks beside checksums, for chunks that a source brought and whose checksums hold. */
  Failure check_format() const;

 private:
  PayloadView view_;
  PanelSource* source_;
  int64_t index_;
  Failure failure_;
};

/** A pass of a source over all panels, or over some, as long as this lives. */
class Pass {
 public:
  /** @param source   null: nothing is to be done. */
  explicit Pass(PanelSource* source);
  Pass(PanelSource* source, const std::vector<int64_t>& panels);
  ~Pass();
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  /** Leaves a panel out. */
  void skip(int64_t panel) const;

 private:
  PanelSource* source_;
};

/** The rows of a panel, in place for a raw payload of one slab, else decoded into this thread's scratch, where they
 *  stay until the next call.
 *  @return kOk, what `held` failed with, or why the chunks cannot be decoded. */
Failure load_panel(const HeldPanel& held, WeightPanel* panel);

/** No memory for `nbytes` bytes of scratch. */
Failure out_of_scratch(int64_t nbytes);

}  // namespace dcext
