#include "runtime/unit_copier.h"

#include <algorithm>
#include <limits>

#include "codec/payload_decoder.h"

namespace dcext {
namespace {

Failure closed() { return {Status::kClosed, "stream", -1, 0, 0}; }

}  // namespace

int64_t DeviceUnit::slot_nbytes() const {
  int64_t end = 0;
  bool valid = true;
  const auto extend = [&](int64_t offset, int64_t nbytes) {
    valid = valid && offset >= 0 && nbytes >= 0 &&
            offset <= std::numeric_limits<int64_t>::max() - nbytes;
    if (valid) end = std::max(end, offset + nbytes);
  };
  for (const HostPart& part : host) extend(part.offset, part.nbytes);
  for (const DecodedPart& part : decoded) extend(part.offset, part.nbytes());
  if (disk == nullptr) return valid && disk_offsets.empty() ? end : -1;
  if (disk_unit < 0 || disk_unit >= disk->num_units()) return -1;
  const std::vector<Piece>& pieces = disk->pieces(disk_unit);
  if (pieces.size() != disk_offsets.size()) return -1;
  for (size_t i = 0; i < pieces.size(); ++i) extend(disk_offsets[i], pieces[i].nbytes);
  return valid ? end : -1;
}

int64_t DeviceUnit::nbytes() const {
  int64_t nbytes = 0;
  for (const HostPart& part : host) nbytes += part.nbytes;
  for (const DecodedPart& part : decoded) nbytes += part.nbytes();
  if (disk == nullptr) return nbytes;
  for (const Piece& piece : disk->pieces(disk_unit)) nbytes += piece.nbytes;
  return nbytes;
}

Failure copy_host_parts(Link& link, const DeviceUnit& unit, uint8_t* slot, Link::Stream stream) {
  for (const DeviceUnit::HostPart& part : unit.host) {
    if (part.nbytes == 0) continue;
    const Failure failure = link.copy(slot + part.offset, part.data, part.nbytes, stream);
    if (!failure.ok()) return failure;
  }
  return {};
}

UnitCopier::UnitCopier(Link& link, const DecodeRing& ring)
    : link_(link), ring_(ring), buffers_(ring.executor == nullptr ? 0 : ring.num_buffers) {
  for (size_t i = 0; i < buffers_.size(); ++i) {
    buffers_[i].data = ring_.data + static_cast<int64_t>(i) * ring_.buffer_nbytes;
  }
}

UnitCopier::~UnitCopier() {
  for (const Buffer& buffer : buffers_) {
    if (buffer.copied != nullptr) link_.destroy_event(buffer.copied);
  }
  for (Link::Event event : spare_) link_.destroy_event(event);
}

// Whole panels, so that no tile is decoded twice.
int64_t UnitCopier::rows_of_buffer(const PayloadView& payload) const {
  const PayloadLayout& layout = payload.layout();
  const auto panel_rows = static_cast<int64_t>(layout.panel_rows);
  const auto panel_nbytes = panel_rows * static_cast<int64_t>(layout.cols);
  return ring_.buffer_nbytes / panel_nbytes * panel_rows;
}

bool UnitCopier::fits(const DeviceUnit& unit) const {
  return std::all_of(unit.decoded.begin(), unit.decoded.end(), [this](const auto& part) {
    const auto rows = static_cast<int64_t>(part.payload.layout().rows);
    const auto cols = static_cast<int64_t>(part.payload.layout().cols);
    return !buffers_.empty() &&
           (rows * cols <= ring_.buffer_nbytes || rows_of_buffer(part.payload) > 0);
  });
}

Failure UnitCopier::copy(const DeviceUnit& unit, uint8_t* slot, const std::atomic<bool>& stopped) {
  Failure failure = copy_host_parts(link_, unit, slot, link_.copy_stream());
  for (const DeviceUnit::DecodedPart& part : unit.decoded) {
    if (failure.ok()) failure = decode(part, slot, stopped);
  }
  if (failure.ok() && unit.disk != nullptr) failure = copy_from_disk(unit, slot, stopped);
  return failure;
}

// The next of the ring, when the copy from it is done.
Failure UnitCopier::next_buffer(Buffer** buffer) {
  Buffer& next = buffers_[next_];
  Failure failure;
  if (next.copied == nullptr) {
    failure = link_.create_event(&next.copied);
  } else {
    failure = link_.wait_on_host(next.copied);
  }
  if (!failure.ok()) return failure;
  next_ = (next_ + 1) % buffers_.size();
  *buffer = &next;
  return {};
}

Failure UnitCopier::decode(const DeviceUnit::DecodedPart& part, uint8_t* slot,
                           const std::atomic<bool>& stopped) {
  const PayloadLayout& layout = part.payload.layout();
  const auto rows = static_cast<int64_t>(layout.rows), cols = static_cast<int64_t>(layout.cols);
  const int64_t step =
      std::max(rows_of_buffer(part.payload), std::min(rows, ring_.buffer_nbytes / cols));
  for (int64_t row = 0; row < rows; row += step) {
    if (stopped) return closed();
    Buffer* buffer;
    Failure failure = next_buffer(&buffer);
    if (!failure.ok()) return failure;
    const Region region{row, std::min(rows, row + step), 0, cols};
    failure = decode_region(part.payload, region, Verify::kNo,
                            reinterpret_cast<int8_t*>(buffer->data), cols, *ring_.executor);
    if (!failure.ok()) return failure;
    failure = link_.copy(slot + part.offset + row * cols, buffer->data, region.rows() * cols,
                         link_.copy_stream());
    if (!failure.ok()) return failure;
    failure = link_.record(buffer->copied, link_.copy_stream());
    if (!failure.ok()) {
      link_.drain();  // nothing else tells when the buffer is free
      return failure;
    }
  }
  return {};
}

Failure UnitCopier::copy_from_disk(const DeviceUnit& unit, uint8_t* slot,
                                   const std::atomic<bool>& stopped) {
  disk_ = unit.disk;
  use_ = disk_->begin(unit.disk_unit);
  const std::vector<Piece>& pieces = disk_->pieces(unit.disk_unit);
  const auto num_pieces = static_cast<int64_t>(pieces.size());
  for (int64_t i = 0; i < num_pieces; ++i) {
    if (stopped) return closed();
    // Copies go on while pieces are there. Before one that is not, slots go back: two users who hold some and wait for
    // more would wait for ever.
    while (!held_.empty() && release_first(!disk_->is_over(*use_, i))) {
    }
    const uint8_t* data;
    Failure failure = disk_->wait(*use_, i, &data);
    if (!failure.ok()) return failure;
    failure = copy_piece(i, data, pieces[i].nbytes, slot + unit.disk_offsets[i]);
    if (!failure.ok()) return failure;
  }
  return {};
}

Failure UnitCopier::copy_piece(int64_t index, const uint8_t* data, int64_t nbytes, uint8_t* dst) {
  Link::Event copied = nullptr;
  Failure failure;
  if (spare_.empty()) {
    failure = link_.create_event(&copied);
  } else {
    copied = spare_.back();
    spare_.pop_back();
  }
  if (failure.ok()) failure = link_.copy(dst, data, nbytes, link_.copy_stream());
  if (failure.ok()) {
    failure = link_.record(copied, link_.copy_stream());
    if (!failure.ok()) link_.drain();
  }
  if (failure.ok()) {
    held_.push_back({index, copied});
    return {};
  }
  if (copied != nullptr) spare_.push_back(copied);
  disk_->release(*use_, index);
  return failure;
}

// Gives the slot of the oldest piece back; false: its copy is under way, and it need not wait.
bool UnitCopier::release_first(bool must_wait) {
  const Held first = held_.front();
  bool happened = false;
  if (!link_.query(first.copied, &happened).ok()) must_wait = true;
  if (!happened && !must_wait) return false;
  if (!happened && !link_.wait_on_host(first.copied).ok()) link_.drain();
  held_.pop_front();
  spare_.push_back(first.copied);
  disk_->release(*use_, first.index);
  return true;
}

void UnitCopier::release() {
  while (!held_.empty()) release_first(true);
  if (use_ != nullptr) disk_->end(use_);
  use_.reset();
}

}  // namespace dcext
