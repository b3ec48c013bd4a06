#include "runtime/panels.h"

#include "base/scratch.h"
#include "codec/zstd_frame.h"

namespace dcext {
namespace {

// Runs on the thread that calls; for work inside a task.
class SerialExecutor final : public Executor {
 public:
  int num_workers() const override { return 1; }
  void run(int64_t num_tasks, FunctionRef<void(int64_t, int)> task) override {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
  }
};

Failure decode_panel(const HeldPanel& held, const Tile& first, int64_t first_chunk, int8_t* dst,
                     int64_t dst_capacity) {
  const PayloadLayout& layout = held.view().layout();
  if (layout.num_slabs() == 1) {
    return decode_chunk(held.view(), first_chunk, held.verify(), dst, dst_capacity);
  }
  SerialExecutor serial;
  const Region region{first.row, first.row + first.rows, 0, layout.cols};
  return decode_region(held.view(), region, held.verify(), dst, layout.cols, serial);
}

}  // namespace

void FailureSlot::record(const Failure& failure) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.ok() || failure.chunk < failure_.chunk) failure_ = failure;
  lowest_.store(failure_.chunk, std::memory_order_relaxed);
}

HeldPanel::HeldPanel(const PayloadView& weight, PanelSource* source, int64_t index)
    : view_(weight), source_(source), index_(index) {
  if (source_ != nullptr) failure_ = source_->acquire(index_, &view_);
}

HeldPanel::~HeldPanel() {
  if (source_ != nullptr && failure_.ok()) source_->release(index_);
}

Failure HeldPanel::check_format() const {
  if (source_ == nullptr) return {};
  const int64_t slabs = view_.layout().num_slabs();
  for (int64_t chunk = index_ * slabs; chunk < (index_ + 1) * slabs; ++chunk) {
    if (const Failure bad = source_->check_format(view_, chunk); !bad.ok()) return bad;
  }
  return {};
}

Pass::Pass(PanelSource* source) : source_(source) {
  if (source_ != nullptr) source_->begin();
}

Pass::Pass(PanelSource* source, const std::vector<int64_t>& panels) : source_(source) {
  if (source_ != nullptr) source_->begin_some(panels);
}

Pass::~Pass() {
  if (source_ != nullptr) source_->end();
}

void Pass::skip(int64_t panel) const {
  if (source_ != nullptr) source_->release(panel);
}

Failure load_panel(const HeldPanel& held, WeightPanel* panel) {
  thread_local Scratch scratch;
  if (!held.failure().ok()) return held.failure();
  const PayloadView& view = held.view();
  const PayloadLayout& layout = view.layout();
  const int64_t first_chunk = held.index() * layout.num_slabs();
  const Tile tile = view.tile(first_chunk);
  const Chunk chunk = view.chunk(first_chunk);
  *panel = {nullptr, layout.cols, tile.rows, layout.cols};
  if (layout.num_slabs() == 1 && chunk.encoding == Encoding::kRaw) {
    panel->data = reinterpret_cast<const int8_t*>(view.data() + chunk.offset);
    return held.verify() == Verify::kYes ? view.verify_chunk(first_chunk) : Failure{};
  }
  const int64_t nbytes = tile.rows * layout.cols + kFrameSlack;
  auto* decoded = reinterpret_cast<int8_t*>(scratch.reserve(nbytes));
  if (decoded == nullptr) return out_of_scratch(nbytes);
  panel->data = decoded;
  const Failure bad = decode_panel(held, tile, first_chunk, decoded, nbytes);
  return bad.ok() ? held.check_format() : bad;
}

Failure out_of_scratch(int64_t nbytes) {
  return Failure{Status::kOutOfMemory, "scratch bytes", -1, static_cast<uint64_t>(nbytes), 0};
}

}  // namespace dcext
