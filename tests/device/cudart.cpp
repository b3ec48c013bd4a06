#include "cudart.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <set>

namespace {

using dcext::CaptureLink;
using dcext::Failure;

std::atomic<CaptureLink*> device{nullptr};
thread_local int current_device = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

std::mutex mutex;
std::set<void*> registered;  // guarded by mutex

CaptureLink& link() { return *device; }

cudaError_t error_of(const Failure& failure) {
  return failure.ok() ? cudaSuccess : cudaErrorUnknown;
}

// What the device's things need.
cudaError_t on_device() {
  return current_device == dcext::kEmulatedDevice ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

// What a capture of any thread forbids to all that are in mode global.
cudaError_t unsafe() {
  if (capture_mode != cudaStreamCaptureModeRelaxed && link().is_any_capturing()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  return on_device();
}

}  // namespace

namespace dcext {

void set_emulated_device(CaptureLink* link) { device = link; }

int64_t num_registered() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int64_t>(registered.size());
}

}  // namespace dcext

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* index) {
  *index = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  if (index != 0 && index != dcext::kEmulatedDevice) return cudaErrorInvalidDevice;
  current_device = index;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking) return cudaErrorUnknown;
  const cudaError_t error = unsafe();
  if (error == cudaSuccess) *stream = static_cast<cudaStream_t>(link().create_stream());
  return error;
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return on_device(); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const cudaError_t error = unsafe();
  if (error == cudaSuccess) link().synchronize(stream);
  return error;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return error_of(link().wait(stream, event));
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id) {
  uint64_t capture;
  const Failure failure = link().capture_of(stream, &capture);
  *status = capture == 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  *id = capture;
  return error_of(failure);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (flags != cudaEventDisableTiming) return cudaErrorUnknown;
  const cudaError_t error = unsafe();
  if (error != cudaSuccess) return error;
  void* made;
  const Failure failure = link().create_event(&made);
  *event = static_cast<cudaEvent_t>(made);
  return error_of(failure);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  link().destroy_event(event);
  return on_device();
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const cudaError_t error = on_device();
  return error == cudaSuccess ? error_of(link().record(event, stream)) : error;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const cudaError_t error = unsafe();
  if (error != cudaSuccess) return error;
  bool happened;
  const Failure failure = link().query(event, &happened);
  if (!failure.ok()) return error_of(failure);
  return happened ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const cudaError_t error = unsafe();
  return error == cudaSuccess ? error_of(link().wait_on_host(event)) : error;
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t nbytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return error_of(link().copy(dst, src, static_cast<int64_t>(nbytes), stream));
}

cudaError_t cudaHostRegister(void* data, size_t, unsigned) {
  const cudaError_t error = unsafe();
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  return registered.insert(data).second ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered;
}

cudaError_t cudaHostUnregister(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  return registered.erase(data) == 1 ? cudaSuccess : cudaErrorUnknown;
}
