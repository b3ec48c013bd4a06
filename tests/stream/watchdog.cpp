#include "watchdog.h"

#include <unistd.h>

#include <chrono>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <set>

namespace dcext::stress {
namespace {

// A thread's place, registered for as long as the thread lives.
struct Station {
  std::mutex mutex;
  Doing::Place place;

  Station();
  ~Station();
};

struct Stations {
  std::mutex mutex;
  std::set<Station*> all;
};

Stations& stations() {
  static Stations* const kStations = new Stations;  // threads may outlive the statics
  return *kStations;
}

Station::Station() {
  const std::lock_guard<std::mutex> lock(stations().mutex);
  stations().all.insert(this);
}

Station::~Station() {
  const std::lock_guard<std::mutex> lock(stations().mutex);
  stations().all.erase(this);
}

Station& this_station() {
  thread_local Station station;
  return station;
}

Doing::Place exchange(const Doing::Place& place) {
  Station& station = this_station();
  const std::lock_guard<std::mutex> lock(station.mutex);
  const Doing::Place before = station.place;
  station.place = place;
  return before;
}

void dump_places() {
  const std::lock_guard<std::mutex> lock(stations().mutex);
  for (Station* station : stations().all) {
    const std::lock_guard<std::mutex> station_lock(station->mutex);
    const Doing::Place& place = station->place;
    if (place.what == nullptr) continue;
    std::fprintf(stderr, "  stream %p, unit %" PRId64 ", piece %" PRId64 ": %s\n", place.stream,
                 place.unit, place.piece, place.what);
  }
}

}  // namespace

void stop(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  _exit(1);
}

Doing::Doing(const char* what, const void* stream, int64_t unit, int64_t piece)
    : before_(exchange({what, stream, unit, piece})) {}

Doing::~Doing() { exchange(before_); }

Watchdog::Watchdog(const std::atomic<int64_t>& count, int patience_s)
    : count_(count), patience_s_(patience_s), thread_([this] { watch(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = true;
  }
  ended_.notify_all();
  thread_.join();
}

void Watchdog::watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  int64_t seen = -1;
  int still_s = 0;
  while (!ended_.wait_for(lock, std::chrono::seconds(1), [this] { return end_; })) {
    const int64_t count = count_;
    still_s = count == seen ? still_s + 1 : 0;
    seen = count;
    if (still_s < patience_s_) continue;
    std::fprintf(stderr, "no step for %d s, after %" PRId64 ":\n", still_s, count);
    dump_places();
    _exit(3);
  }
}

}  // namespace dcext::stress
