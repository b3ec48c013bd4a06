#include "faulty_source.h"

#include <chrono>
#include <cstdlib>
#include <thread>

#include "fuzz/fuzz_random.h"
#include "watchdog.h"

namespace dcext::stress {
namespace {

constexpr size_t kPage = 4096;

}  // namespace

GuardedSlots::GuardedSlots(int64_t num_slots, int64_t slot_nbytes)
    : inside_(new std::atomic<const char*>[num_slots]()) {
  const size_t nbytes = static_cast<size_t>(num_slots * slot_nbytes);
  memory_ = {static_cast<uint8_t*>(std::aligned_alloc(kPage, nbytes)), slot_nbytes, num_slots};
  if (memory_.data == nullptr) stop("no memory for slots");
}

GuardedSlots::~GuardedSlots() { std::free(memory_.data); }

int64_t GuardedSlots::slot_of(const uint8_t* data, int64_t nbytes) const {
  const int64_t begin = data - memory_.data, slot = begin / memory_.slot_nbytes;
  if (begin < 0 || slot >= memory_.num_slots ||
      begin % memory_.slot_nbytes + nbytes > memory_.slot_nbytes) {
    stop("bytes outside all slots");
  }
  return slot;
}

void GuardedSlots::enter(int64_t slot, const char* what) {
  if (const char* const other = inside_[slot].exchange(what)) {
    stop("slot %d: %s while %s", static_cast<int>(slot), what, other);
  }
}

void GuardedSlots::leave(int64_t slot) { inside_[slot] = nullptr; }

Failure FaultySource::read(int64_t offset, int64_t nbytes, uint8_t* dst, const uint8_t** data) {
  fuzz::Random random(seed_ + static_cast<uint64_t>(reads_++));
  const int64_t slot = slots_.slot_of(dst, nbytes + kSlackNbytes);
  slots_.enter(slot, "being read into");
  if (faults_.late_one_in != 0 && random.one_in(faults_.late_one_in)) {
    std::this_thread::sleep_for(std::chrono::microseconds(random.between(20, 800)));
  }
  Failure failure;
  {
    const Doing doing("a read of the file", this, offset / static_cast<int64_t>(kPage));
    failure = file_.read(offset, nbytes, dst, data);
  }
  if (!failure.ok()) stop("a real read failed: %s, %s", to_string(failure.status), failure.field);
  if (faults_.fail_one_in != 0 && random.one_in(faults_.fail_one_in)) {
    const Status status = random.one_in(3) ? Status::kFileChanged : Status::kReadError;
    failure = {status, kInjected, -1, 0, static_cast<uint64_t>(++injected_)};
  }
  slots_.leave(slot);
  return failure;
}

}  // namespace dcext::stress
