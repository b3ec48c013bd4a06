#pragma once

#include <atomic>
#include <memory>

#include "runtime/weight_stream.h"

namespace dcext::stress {

/** Slots of exactly the memory that a stream is given, with a note of who is in each. */
class GuardedSlots {
 public:
  GuardedSlots(int64_t num_slots, int64_t slot_nbytes);
  ~GuardedSlots();
  GuardedSlots(const GuardedSlots&) = delete;
  GuardedSlots& operator=(const GuardedSlots&) = delete;

  SlotMemory memory() const { return memory_; }

  /** The slot of `data`, in which `nbytes` bytes must fit; else the process ends. */
  int64_t slot_of(const uint8_t* data, int64_t nbytes) const;

  /** Someone reads into a slot, or holds what was read; two at a time end the process. */
  void enter(int64_t slot, const char* what);
  void leave(int64_t slot);

 private:
  SlotMemory memory_;
  std::unique_ptr<std::atomic<const char*>[]> inside_;
};

/** What a source does wrong: one in so many reads, 0 for none. */
struct Faults {
  uint64_t fail_one_in = 0;
  uint64_t late_one_in = 0;
};

/** A file whose reads fail or come late as if by chance. */
class FaultySource final : public ReadSource {
 public:
  static constexpr const char* kInjected = "injected";  ///< Failure::field; `found` counts them

  FaultySource(ReadSource& file, GuardedSlots& slots, Faults faults, uint64_t seed)
      : file_(file), slots_(slots), faults_(faults), seed_(seed) {}

  Failure read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) override;

  int64_t injected() const { return injected_; }

 private:
  ReadSource& file_;
  GuardedSlots& slots_;
  const Faults faults_;
  const uint64_t seed_;
  std::atomic<int64_t> reads_{0}, injected_{0};
};

}  // namespace dcext::stress
