#pragma once

#include <cstdint>

#include "format/payload.h"

namespace dcext {

/** The way from host memory to a device: copies on streams, and events that order streams.
 *
 *  Streams and events mean what they mean in CUDA: a stream runs what it is given in order; an event stands for what a
 *  stream was given before the last `record`, and one that was never recorded has happened. All but `wait_on_host` and
 *  `drain` return at once. Failures are kDeviceError (found: the device's own code) or kOutOfMemory.
 *
 *  Threading: any function from any thread; one event not by two at a time unless all only wait or query. */
class Link {
 public:
  using Stream = void*;  ///< of a CUDA link a cudaStream_t
  using Event = void*;

  virtual ~Link() = default;

  /** The link's own stream for copies, and another for those that a capture records. */
  virtual Stream copy_stream() const = 0;
  virtual Stream capture_stream() const = 0;

  virtual Failure create_event(Event* event) = 0;
  /** Whether it has happened or not. */
  virtual void destroy_event(Event event) = 0;

  /** @param src   host memory that stays as it is until the copy is done; pinned, or the device's driver may wait. */
  virtual Failure copy(void* dst, const void* src, int64_t nbytes, Stream stream) = 0;

  virtual Failure record(Event event, Stream stream) = 0;

  /** What `stream` is given from now on runs after the event. */
  virtual Failure wait(Stream stream, Event event) = 0;

  virtual Failure query(Event event, bool* happened) = 0;

  /** Blocks until the event has happened; for threads of the background and for destructors. */
  virtual Failure wait_on_host(Event event) = 0;

  /** Blocks until the copy stream has nothing left. */
  virtual Failure drain() = 0;

  /** Makes memory of any size readable by the device where it lies, until it is unpinned. */
  virtual Failure pin(void* data, int64_t nbytes) = 0;
  virtual void unpin(void* data) = 0;

  /** @param id   receives which capture records what `stream` is given; 0: none, it runs. */
  virtual Failure capture_of(Stream stream, uint64_t* id) = 0;
};

}  // namespace dcext
