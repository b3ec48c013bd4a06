// Uses weight streams in every way that is allowed, and some that are rare, and compares every byte that they bring.
//
// Usage: stream_stress [--steps N] [--seed S] [--threads T] [--patience SECONDS] [--folder FOLDER]
//        stream_stress cases | idle | files FOLDER
//
// Prints what it did as a line of JSON. Exit status 1: something was wrong, as stderr says; 3: nothing moved for
// --patience seconds. A step is a unit begun and ended, T the most threads that use a stream; four streams live at a
// time. FOLDER is where the file goes that is read.

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cases.h"
#include "pattern_file.h"
#include "session.h"
#include "watchdog.h"

namespace dcext::stress {
namespace {

constexpr int64_t kFileNbytes = (int64_t{16} << 20) + 1234;
constexpr int kStreams = 4;

struct Options {
  int64_t steps = 10000, seed = 1, threads = 4, patience = 60;
  std::string folder = ".";
};

void print(const World& world, const Options& options) {
  std::printf("{\"seed\": %" PRId64 ", \"steps\": %" PRId64, options.seed, world.steps.load());
  const std::pair<const char*, const std::atomic<int64_t>&> counts[] = {
      {"failures_injected", world.injected},
      {"failed_uses", world.failed_steps},
      {"closed_uses", world.closed_steps},
      {"early_ends", world.early_steps},
      {"look_ups", world.look_ups},
      {"streams", world.streams},
      {"closes", world.closes},
      {"left_threads", world.left_threads},
      {"peak_slots", world.peak_slots},
      {"read_bytes", world.read_nbytes},
      {"used_bytes", world.used_nbytes},
      {"dropped_bytes", world.dropped_nbytes},
  };
  for (const auto& [name, count] : counts) std::printf(", \"%s\": %" PRId64, name, count.load());
  std::printf("}\n");
}

int run(const Options& options) {
  const auto bypassing = open_pattern_file(options.folder, kFileNbytes, PageCache::kBypass);
  const auto kept = open_pattern_file(options.folder, kFileNbytes, PageCache::kKeep);
  ReadThreads threads(4);
  ThreadPool pool(3);
  World world{
      threads, pool, {bypassing.get(), kept.get(), kept.get()}, kFileNbytes, options.threads};
  const Watchdog watchdog(world.steps, static_cast<int>(options.patience));
  std::atomic<uint64_t> next_seed{static_cast<uint64_t>(options.seed) << 32};
  std::vector<std::thread> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.emplace_back([&] {
      while (world.steps < options.steps) Session(world, next_seed++).run();
    });
  }
  for (std::thread& stream : streams) stream.join();
  print(world, options);
  return 0;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = arguments[i];
    if (i + 1 == count) stop("expected a value behind %s", name.c_str());
    const char* const value = arguments[i + 1];
    const int64_t number = std::strtoll(value, nullptr, 10);
    if (name == "--steps") {
      options.steps = number;
    } else if (name == "--seed") {
      options.seed = number;
    } else if (name == "--threads") {
      options.threads = number;
    } else if (name == "--patience") {
      options.patience = number;
    } else if (name == "--folder") {
      options.folder = value;
    } else {
      stop("unknown option %s", name.c_str());
    }
  }
  return options;
}

}  // namespace
}  // namespace dcext::stress

int main(int count, char** arguments) {
  using namespace dcext::stress;
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "cases") return run_cases();
  if (mode == "idle") return run_idle();
  if (mode == "files" && count == 3) return run_files(arguments[2]);
  return run(parse(count, arguments));
}
