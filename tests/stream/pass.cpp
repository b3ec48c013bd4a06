#include "pass.h"

#include <chrono>
#include <cstring>
#include <thread>

#include "fuzz/fuzz_random.h"
#include "pattern_file.h"
#include "watchdog.h"

namespace dcext::stress {

Pass::Pass(WeightStream& stream, GuardedSlots& slots, int64_t unit, std::vector<Piece> pieces,
           std::shared_ptr<WeightStream::Use> use, uint64_t seed)
    : stream_(stream),
      slots_(slots),
      unit_(unit),
      pieces_(std::move(pieces)),
      seed_(seed),
      use_(std::move(use)),
      held_(new Held[pieces_.size()]) {
  for (size_t piece = 0; piece < pieces_.size(); ++piece) {
    const int64_t of = 1 + static_cast<int64_t>((seed_ + piece) % 3);
    held_[piece].left = of;
    for (int64_t i = 0; i < of; ++i) panels_.push_back({static_cast<int64_t>(piece), i, of});
  }
}

void Pass::use_panels(int64_t count, int workers, ThreadPool& pool,
                      const std::function<void()>& before) {
  const Doing doing(workers > 1 ? "the pool's turn" : "panels", &stream_, unit_);
  // Nobody comes for the rest: a piece of which some is used must not be held until others were waited for.
  for (int64_t i = count; i < num_panels(); ++i) --held_[panels_[i].piece].left;
  const auto task = [&](int64_t index, int) { use_panel(panels_[index], before); };
  pool.run(count, workers, task);
}

void Pass::use_panel(const Panel& panel, const std::function<void()>& before) {
  const uint8_t* data;
  if (failed_ || closed_) {
    // Whoever waits for a later piece may need this one's slot.
    release(panel.piece);
    return;
  }
  before();
  if (wait(panel, &data)) compare(panel, data);
  release(panel.piece);
}

bool Pass::wait(const Panel& panel, const uint8_t** data) {
  const Piece& piece = pieces_[panel.piece];
  Failure failure;
  {
    const Doing doing("wait", &stream_, unit_, panel.piece);
    failure = stream_.wait(*use_, panel.piece, data);
  }
  if (failure.status == Status::kClosed) {
    closed_ = true;
    return false;
  }
  if (!failure.ok()) {
    if (std::strcmp(failure.field, FaultySource::kInjected) != 0) {
      stop("a failure that was not injected: %s, %s", to_string(failure.status), failure.field);
    }
    failed_ = true;
    return false;
  }
  const int64_t slot = slots_.slot_of(*data, piece.nbytes);
  int64_t before = -1;
  if (held_[panel.piece].slot.compare_exchange_strong(before, slot)) {
    slots_.enter(slot, "held");
    used_nbytes_ += piece.nbytes;
  } else if (before != slot) {
    stop("a piece that was moved while it was held");
  }
  return true;
}

// The panel's share of the piece.
void Pass::compare(const Panel& panel, const uint8_t* data) const {
  const Piece& piece = pieces_[panel.piece];
  const int64_t begin = piece.nbytes * panel.number / panel.of;
  const int64_t end = piece.nbytes * (panel.number + 1) / panel.of;
  if ((reinterpret_cast<uintptr_t>(data) ^ static_cast<uint64_t>(piece.offset)) % 4096 != 0) {
    stop("data that are not aligned as in the file");
  }
  fuzz::Random random(seed_ ^ static_cast<uint64_t>(piece.offset));
  if (random.one_in(64)) {
    std::this_thread::sleep_for(std::chrono::microseconds(random.between(10, 300)));
  }
  if (!matches_pattern(data + begin, piece.offset + begin, end - begin)) {
    stop("wrong bytes: unit %d, piece %d", static_cast<int>(unit_), static_cast<int>(panel.piece));
  }
}

void Pass::release(int64_t piece) {
  Held& held = held_[piece];
  if (--held.left != 0) return;
  const int64_t slot = held.slot.exchange(-1);
  if (slot < 0) return;  // it failed, or was skipped
  slots_.leave(slot);
  stream_.release(*use_, piece);
}

Pass::Outcome Pass::end() {
  const Doing doing("end", &stream_, unit_);
  for (size_t piece = 0; piece < pieces_.size(); ++piece) {
    const int64_t slot = held_[piece].slot.exchange(-1);
    if (slot >= 0) slots_.leave(slot);
  }
  stream_.end(use_);
  return {failed_, closed_, used_nbytes_};
}

}  // namespace dcext::stress
