#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/device_stream.h"
#include "torch/ops_stream.h"

namespace dcext {

/** A device stream and what it borrows, as tensors. Operators find it by its handle, and keep it while they run. */
class TensorStream {
 public:
  /** Tensors, and where in the slot their bytes go. */
  using Parts = std::vector<std::pair<at::Tensor, int64_t>>;

  /** Slots must have been allocated on the current stream, or be ready for any.
   *  @param host   parts of each unit that are copied as they are: contiguous uint8 or int8 in host memory, each the whole
   *      of its memory, which is pinned as long as the stream lives.
   *  @param decoded   parts of each unit that are decoded on the way: verified payloads.
   *  @param slots   1-D uint8 tensors of one size on one device.
   *  @param ring   (buffers, bytes) uint8 in host memory, or empty where nothing is decoded.
   *  @param disk_stream   reads groups of payloads, or null.
   *  @param disk   for each unit, where in the slot the payloads of its group go, or nothing; groups are numbered in the
   *      order of the units that have one.
   *  @param max_ahead_nbytes, ahead_in_captures   see DeviceStreamOptions. */
  static std::shared_ptr<TensorStream> open(std::vector<Parts> host, std::vector<Parts> decoded,
                                            std::vector<at::Tensor> slots, at::Tensor ring,
                                            std::shared_ptr<HostStream> disk_stream,
                                            const std::vector<std::vector<int64_t>>& disk,
                                            int64_t max_ahead_nbytes, bool ahead_in_captures);
  ~TensorStream();
  TensorStream(const TensorStream&) = delete;
  TensorStream& operator=(const TensorStream&) = delete;

  int64_t handle() const { return handle_; }
  DeviceStream& stream() const { return *stream_; }
  void join() const;
  /** All use fails from now on. */
  void close();

 private:
  TensorStream(std::vector<Parts> host, std::vector<Parts> decoded, std::vector<at::Tensor> slots,
               at::Tensor ring);
  void pin(Link& link, const at::Tensor& tensor);
  void read_from_disk(std::shared_ptr<HostStream> disk_stream,
                      const std::vector<std::vector<int64_t>>& disk,
                      std::vector<DeviceUnit>* units);
  Link::Stream current_stream() const;
  void wait_for_slots() const;

  const std::vector<Parts> host_, decoded_;
  const std::vector<at::Tensor> slots_;
  const at::Tensor ring_;
  int64_t handle_ = 0;
  std::shared_ptr<Link> link_;
  std::vector<void*> pinned_;
  std::shared_ptr<HostStream> disk_stream_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<DeviceStream> stream_;
};

/** The handle of a stream that brings nothing: what lies in a slot stays there. */
constexpr int64_t kNoStream = 0;

/** dcext::fetch_ and dcext::fetched_ for a consumer: the calling thread itself on the CPU, or a stream of a device. */
void fetch(int64_t handle, int64_t unit, const at::Tensor& slot, Link::Stream consumer);
void fetched(int64_t handle, int64_t unit, const at::Tensor& slot, Link::Stream consumer);

void fetch_cpu(int64_t handle, int64_t unit, at::Tensor slot);
/** @param after   not read: in a compiler's graph, the call comes behind what computes it. */
void fetched_cpu(int64_t handle, int64_t unit, at::Tensor slot,
                 const std::optional<at::Tensor>& after);

#ifdef DCEXT_WITH_CUDA
/** The current stream of a device, to torch. Defined in ops_cuda.cpp. */
Link::Stream current_cuda_stream(at::Device device);
#endif

}  // namespace dcext
