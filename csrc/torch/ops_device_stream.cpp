#include "torch/ops_device_stream.h"

#include <mutex>
#include <unordered_map>

#include "base/fork_safe.h"
#include "runtime/host_link.h"
#include "runtime/thread_pool.h"
#include "torch/ops_common.h"
#ifdef DCEXT_WITH_CUDA
#include "cuda/cuda_link.h"
#endif

namespace dcext {
namespace {

constexpr const char* kOpen = "dcext.DeviceStream";

// Streams by handle. Never destroyed: operators may run while the process ends.
struct Table {
  std::mutex& mutex = fork_safe_mutex<Table>();
  std::unordered_map<int64_t, std::weak_ptr<TensorStream>> streams;
  int64_t last_handle = 0;
};

Table& table() {
  static Table* const kTable = new Table;
  return *kTable;
}

std::shared_ptr<TensorStream> find(const char* op, int64_t handle) {
  Table& all = table();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.streams.find(handle);
  std::shared_ptr<TensorStream> stream;
  if (found != all.streams.end()) stream = found->second.lock();
  TORCH_CHECK(stream != nullptr, op, ": stream: expected the handle of an open stream, got ",
              handle);
  TORCH_CHECK(stream->stream().is_usable(), op,
              ": stream: expected one made in this process, got one of its parent");
  return stream;
}

std::shared_ptr<Link> make_link(at::Device device) {
  if (device.is_cpu()) return std::make_shared<HostLink>();
#ifdef DCEXT_WITH_CUDA
  if (device.is_cuda()) {
    std::unique_ptr<Link> link;
    raise_if_failed(kOpen, make_cuda_link(device.index(), &link));
    return link;
  }
#endif
  TORCH_CHECK_VALUE(false, kOpen, ": slots: expected a device that dcext was built for, got ",
                    device);
}

void check_slots(const std::vector<at::Tensor>& slots) {
  TORCH_CHECK_VALUE(!slots.empty(), kOpen, ": slots: expected at least 1, got none");
  for (const at::Tensor& slot : slots) {
    TORCH_CHECK_TYPE(slot.scalar_type() == at::kByte, kOpen, ": slots: expected torch.uint8, got ",
                     slot.scalar_type());
    TORCH_CHECK_VALUE(slot.dim() == 1 && slot.is_contiguous() && slot.numel() == slots[0].numel() &&
                          slot.device() == slots[0].device(),
                      kOpen, ": slots: expected contiguous 1-D tensors of ", slots[0].numel(),
                      " bytes on ", slots[0].device(), ", got shape ", slot.sizes(), " on ",
                      slot.device());
  }
}

DeviceUnit::HostPart host_part(const at::Tensor& tensor, int64_t offset) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kByte || tensor.scalar_type() == at::kChar, kOpen,
                   ": host: expected torch.uint8 or torch.int8, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous(), kOpen,
                    ": host: expected contiguous CPU tensors, got strides ", tensor.strides(),
                    " on ", tensor.device());
  return {static_cast<const uint8_t*>(tensor.const_data_ptr()), tensor.numel(), offset};
}

void check_slot(const char* op, const TensorStream& stream, int64_t unit, const at::Tensor& slot) {
  const DeviceStream& units = stream.stream();
  TORCH_CHECK_VALUE(unit >= 0 && unit < units.num_units(), op, ": unit: expected 0 to ",
                    units.num_units() - 1, ", got ", unit);
  TORCH_CHECK_TYPE(slot.scalar_type() == at::kByte, op, ": slot: expected torch.uint8, got ",
                   slot.scalar_type());
  // A copy of the slot, as compilers make where they do not see that they need none, would not receive the bytes.
  TORCH_CHECK_VALUE(slot.is_contiguous() && slot.numel() >= units.nbytes(unit) &&
                        slot.const_data_ptr() == units.address(unit),
                    op, ": slot: expected the stream's own slot for unit ", unit,
                    ", with at least ", units.nbytes(unit), " bytes, got another tensor, of shape ",
                    slot.sizes(), " on ", slot.device());
}

}  // namespace

TensorStream::TensorStream(std::vector<Parts> host, std::vector<Parts> decoded,
                           std::vector<at::Tensor> slots, at::Tensor ring)
    : host_(std::move(host)),
      decoded_(std::move(decoded)),
      slots_(std::move(slots)),
      ring_(std::move(ring)) {}

std::shared_ptr<TensorStream> TensorStream::open(std::vector<Parts> host,
                                                 std::vector<Parts> decoded,
                                                 std::vector<at::Tensor> slots, at::Tensor ring,
                                                 std::shared_ptr<HostStream> disk_stream,
                                                 const std::vector<std::vector<int64_t>>& disk,
                                                 int64_t max_ahead_nbytes, bool ahead_in_captures) {
  TORCH_CHECK_VALUE(host.size() == decoded.size() && !host.empty(), kOpen,
                    ": expected as many lists of decoded as of host parts, and at least one, got ",
                    decoded.size(), " and ", host.size());
  TORCH_CHECK_VALUE(max_ahead_nbytes >= 0, kOpen, ": max_ahead_nbytes: expected 0 or more, got ",
                    max_ahead_nbytes);
  TORCH_CHECK_VALUE(
      ring.is_cpu() && ring.is_contiguous() && ring.dim() == 2 && ring.scalar_type() == at::kByte,
      kOpen, ": ring: expected a contiguous uint8 CPU tensor of shape ",
      "[buffers, bytes], got shape ", ring.sizes(), " on ", ring.device());
  check_slots(slots);
  std::shared_ptr<TensorStream> made(
      new TensorStream(std::move(host), std::move(decoded), std::move(slots), std::move(ring)));
  made->link_ = make_link(made->slots_[0].device());
  std::vector<DeviceUnit> units(made->host_.size());
  for (size_t i = 0; i < units.size(); ++i) {
    for (const auto& [tensor, offset] : made->host_[i]) {
      units[i].host.push_back(host_part(tensor, offset));
      made->pin(*made->link_, tensor);
    }
    for (const auto& [payload, offset] : made->decoded_[i]) {
      units[i].decoded.push_back({parse_payload(kOpen, payload), offset});
    }
  }
  made->read_from_disk(std::move(disk_stream), disk, &units);
  DecodeRing buffers;
  if (made->ring_.numel() > 0) {
    made->pin(*made->link_, made->ring_);
    made->executor_ = std::make_unique<PoolExecutor>(default_pool(), default_pool().num_threads());
    buffers = {made->ring_.mutable_data_ptr<uint8_t>(), made->ring_.size(1), made->ring_.size(0),
               made->executor_.get()};
  }
  DeviceSlots addresses{{}, made->slots_[0].numel()};
  for (const at::Tensor& slot : made->slots_) {
    addresses.data.push_back(slot.mutable_data_ptr<uint8_t>());
  }
  raise_if_failed(kOpen,
                  DeviceStream::create(*made->link_, std::move(units), addresses, buffers,
                                       {max_ahead_nbytes, ahead_in_captures}, &made->stream_));
  made->wait_for_slots();
  Table& all = table();
  const std::lock_guard<std::mutex> lock(all.mutex);
  made->handle_ = ++all.last_handle;
  all.streams[made->handle_] = made;
  return made;
}

void TensorStream::read_from_disk(std::shared_ptr<HostStream> disk_stream,
                                  const std::vector<std::vector<int64_t>>& disk,
                                  std::vector<DeviceUnit>* units) {
  TORCH_CHECK_VALUE(disk.size() == units->size(), kOpen, ": disk: expected ", units->size(),
                    " lists, got ", disk.size());
  int64_t next = 0;
  for (size_t i = 0; i < units->size(); ++i) {
    if (disk[i].empty()) continue;
    TORCH_CHECK_VALUE(disk_stream != nullptr, kOpen, ": disk_stream: expected one, got none");
    const auto& layers = disk_stream->group(kOpen, next);
    TORCH_CHECK_VALUE(layers.size() == disk[i].size(), kOpen, ": disk: expected ", layers.size(),
                      " offsets for unit ", i, ", got ", disk[i].size());
    DeviceUnit& unit = (*units)[i];
    unit.disk = &disk_stream->stream();
    unit.disk_unit = next++;
    for (size_t k = 0; k < layers.size(); ++k) {
      for (const Piece& piece : layers[k]->pieces.pieces) {
        unit.disk_offsets.push_back(disk[i][k] + piece.offset - layers[k]->offset);
      }
    }
  }
  if (disk_stream == nullptr) return;
  raise_if_failed(kOpen, link_->pin(disk_stream->slots_data(), disk_stream->slots_nbytes()));
  pinned_.push_back(disk_stream->slots_data());
  disk_stream_ = std::move(disk_stream);
}

void TensorStream::pin(Link& link, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  void* const data = const_cast<void*>(tensor.const_data_ptr());
  raise_if_failed(kOpen, link.pin(data, static_cast<int64_t>(tensor.nbytes())));
  pinned_.push_back(data);
}

TensorStream::~TensorStream() {
  {
    Table& all = table();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.streams.erase(handle_);
  }
  if (stream_ != nullptr && !stream_->is_usable()) {
    stream_.release();  // NOLINT: its thread and its locks are the parent's
    return;
  }
  stream_.reset();
  for (void* data : pinned_) link_->unpin(data);
}

void TensorStream::close() {
  if (!stream_->is_usable()) return;
  stream_->close();
}

Link::Stream TensorStream::current_stream() const {
#ifdef DCEXT_WITH_CUDA
  if (slots_[0].is_cuda()) return current_cuda_stream(slots_[0].device());
#endif
  return HostLink::kNow;
}

// The allocator gives out memory that the current stream may still be at work on.
void TensorStream::wait_for_slots() const {
  Link::Event allocated;
  raise_if_failed(kOpen, link_->create_event(&allocated));
  Failure failure = link_->record(allocated, current_stream());
  if (failure.ok()) failure = link_->wait(link_->copy_stream(), allocated);
  link_->destroy_event(allocated);
  raise_if_failed(kOpen, failure);
}

void TensorStream::join() const {
  raise_if_failed("dcext.DeviceStream.join", stream_->join(current_stream()));
}

void fetch(int64_t handle, int64_t unit, const at::Tensor& slot, Link::Stream consumer) {
  constexpr const char* kOp = "dcext::fetch_";
  if (handle == kNoStream) return;
  const std::shared_ptr<TensorStream> stream = find(kOp, handle);
  check_slot(kOp, *stream, unit, slot);
  uint8_t* address;
  raise_if_failed(kOp, stream->stream().begin(unit, consumer, &address));
}

void fetched(int64_t handle, int64_t unit, const at::Tensor& slot, Link::Stream consumer) {
  constexpr const char* kOp = "dcext::fetched_";
  if (handle == kNoStream) return;
  const std::shared_ptr<TensorStream> stream = find(kOp, handle);
  check_slot(kOp, *stream, unit, slot);
  raise_if_failed(kOp, stream->stream().end(unit, consumer));
}

void fetch_cpu(int64_t handle, int64_t unit, at::Tensor slot) {
  fetch(handle, unit, slot, HostLink::kNow);
}

void fetched_cpu(int64_t handle, int64_t unit, at::Tensor slot,
                 const std::optional<at::Tensor>& after) {
  fetched(handle, unit, slot, HostLink::kNow);
}

}  // namespace dcext
