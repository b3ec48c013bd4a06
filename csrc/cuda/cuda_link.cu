// A link of streams and events of the CUDA runtime. No kernels. Not yet run on a GPU.

#include "cuda/cuda_link.h"

#include <cuda_runtime_api.h>

namespace dcext {
namespace {

cudaStream_t as_stream(Link::Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(Link::Event event) { return static_cast<cudaEvent_t>(event); }

Failure result(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // unless it is sticky, it is reported here alone
  return {error == cudaErrorMemoryAllocation ? Status::kOutOfMemory : Status::kDeviceError, call,
          -1, 0, static_cast<uint64_t>(error)};
}

// While it lives, the link's device is the thread's, and calls that a capture in any thread would forbid (events that
// are made, queried and waited for, memory that is pinned) are allowed: none of them concerns a stream in a capture.
class Scope {
 public:
  explicit Scope(int device) {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~Scope() {
    if (changed_) cudaSetDevice(before_);
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  // Makes a call, if the device could be chosen.
  template <typename Call>
  Failure run(const char* name, Call call) {
    return result(name, error_ == cudaSuccess ? call() : error_);
  }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  cudaError_t error_;
  int before_ = 0;
  bool changed_ = false;
};

class CudaLink final : public Link {
 public:
  explicit CudaLink(int device) : device_(device) {}

  ~CudaLink() override {
    const Scope scope(device_);
    if (copies_ != nullptr) cudaStreamDestroy(copies_);
    if (captures_ != nullptr) cudaStreamDestroy(captures_);
  }

  Failure open() {
    Scope scope(device_);
    Failure failure = scope.run("cudaStreamCreateWithFlags", [this] {
      return cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking);
    });
    if (!failure.ok()) return failure;
    return scope.run("cudaStreamCreateWithFlags", [this] {
      return cudaStreamCreateWithFlags(&captures_, cudaStreamNonBlocking);
    });
  }

  Stream copy_stream() const override { return copies_; }
  Stream capture_stream() const override { return captures_; }

  Failure create_event(Event* event) override {
    cudaEvent_t made = nullptr;
    const Failure failure = Scope(device_).run("cudaEventCreateWithFlags", [&] {
      return cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
    });
    *event = made;
    return failure;
  }

  void destroy_event(Event event) override {
    const Scope scope(device_);
    cudaEventDestroy(as_event(event));
  }

  Failure copy(void* dst, const void* src, int64_t nbytes, Stream stream) override {
    return Scope(device_).run("cudaMemcpyAsync", [&] {
      return cudaMemcpyAsync(dst, src, static_cast<size_t>(nbytes), cudaMemcpyHostToDevice,
                             as_stream(stream));
    });
  }

  Failure record(Event event, Stream stream) override {
    return Scope(device_).run("cudaEventRecord",
                              [&] { return cudaEventRecord(as_event(event), as_stream(stream)); });
  }

  Failure wait(Stream stream, Event event) override {
    return Scope(device_).run("cudaStreamWaitEvent", [&] {
      return cudaStreamWaitEvent(as_stream(stream), as_event(event), 0);
    });
  }

  Failure query(Event event, bool* happened) override {
    const Scope scope(device_);
    const cudaError_t error = cudaEventQuery(as_event(event));
    *happened = error == cudaSuccess;
    if (error != cudaErrorNotReady) return result("cudaEventQuery", error);
    cudaGetLastError();
    return {};
  }

  Failure wait_on_host(Event event) override {
    return Scope(device_).run("cudaEventSynchronize",
                              [&] { return cudaEventSynchronize(as_event(event)); });
  }

  Failure drain() override {
    return Scope(device_).run("cudaStreamSynchronize",
                              [this] { return cudaStreamSynchronize(copies_); });
  }

  // The memory keeps its size and its huge pages: cudaHostAlloc would give neither.
  Failure pin(void* data, int64_t nbytes) override {
    return Scope(device_).run("cudaHostRegister", [&] {
      return cudaHostRegister(data, static_cast<size_t>(nbytes), cudaHostRegisterDefault);
    });
  }

  void unpin(void* data) override {
    const Scope scope(device_);
    if (cudaHostUnregister(data) != cudaSuccess) cudaGetLastError();
  }

  Failure capture_of(Stream stream, uint64_t* id) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    const Failure failure = Scope(device_).run("cudaStreamGetCaptureInfo", [&] {
      return cudaStreamGetCaptureInfo(as_stream(stream), &status, &capture);
    });
    *id = 0;
    if (!failure.ok() || status == cudaStreamCaptureStatusNone) return failure;
    if (status == cudaStreamCaptureStatusInvalidated) {
      return result("cudaStreamGetCaptureInfo", cudaErrorStreamCaptureInvalidated);
    }
    *id = capture;
    return {};
  }

 private:
  const int device_;
  cudaStream_t copies_ = nullptr, captures_ = nullptr;
};

}  // namespace

Failure make_cuda_link(int device, std::unique_ptr<Link>* link) {
  auto made = std::make_unique<CudaLink>(device);
  const Failure failure = made->open();
  if (failure.ok()) *link = std::move(made);
  return failure;
}

}  // namespace dcext
