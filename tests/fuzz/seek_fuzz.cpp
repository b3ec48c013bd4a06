// Property tests and fuzzing of the seek index (codec/seek_index.h), built by build.py with sanitizers.
//
//   seek_fuzz frames --count N --seed S   random frames of every kind: index, libzstd and RFC 8878 agree on each
//   seek_fuzz fuzz --seconds T --seed S --corpus DIR   mutates inputs; those that reach new code are kept in DIR
//   seek_fuzz minimize --corpus DIR   removes inputs that are large or reach nothing of their own
//   seek_fuzz run FILE...   runs single inputs, such as what a failure has left

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "coverage.h"
#include "decoder_check.h"
#include "fuzz_input.h"
#include "mutator.h"
#include "payload_writer.h"

// Wide red zones find what goes far past a buffer. Leaks are not looked for: that needs ptrace, which containers forbid.
// Whatever fails aborts, so that one callback sees it.
extern "C" const char* __asan_default_options() {
  return "redzone=256:detect_leaks=0:handle_abort=1";
}
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }

namespace dcext::fuzz {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr size_t kMostKept =
    6000;  // bytes of an input that is kept; larger ones guide the run that finds them
constexpr const char* kFailedInput = "seek_fuzz_failed_input";

// Leaves the input that failed in the current folder.
void save_failed_input() {
  if (current_input() == nullptr) return;
  if (write_file(kFailedInput, current_input()->to_bytes())) {
    std::fprintf(stderr, "seek_fuzz: the input is in %s\n", kFailedInput);
  }
}

struct Options {
  std::string mode, corpus;
  int64_t count = 100000;
  double seconds = 10;
  uint64_t seed = 1;
  std::vector<std::string> files;
};

int run_frames(const Options& options) {
  Random random(options.seed);
  VariantCounts counts;
  const Clock::time_point start = Clock::now();
  int64_t frames = 0, payloads = 0, outside = 0, nbytes = 0;
  while (frames < options.count) {
    RandomPayload payload = random_payload(random, counts);
    const FuzzInput input{std::move(payload.bytes), {}};
    const CheckResult result = check_input(input, &payload.matrix);
    if (!result.parsed) fail("a payload that was written is not read");
    if (result.seek != (payload.outside ? SeekResult::kOutsideProfile : SeekResult::kIndexed)) {
      fail(payload.outside ? "a payload outside the profile is indexed or called corrupt"
                           : "a payload inside the profile is not indexed");
    }
    if (result.libzstd_decodes != payload.decodable) fail("libzstd refuses what was written");
    frames += payload.num_frames;
    outside += payload.outside;
    nbytes += static_cast<int64_t>(payload.matrix.size());
    ++payloads;
  }
  const int missing = counts.report();
  std::printf("%lld frames in %lld payloads of %lld weights, %lld of them outside, in %.1f s\n",
              static_cast<long long>(frames), static_cast<long long>(payloads),
              static_cast<long long>(nbytes), static_cast<long long>(outside),
              seconds_since(start));
  if (missing != 0) std::printf("%d variants never occurred\n", missing);
  return missing == 0 ? 0 : 1;
}

// One run under coverage; how much of it was new.
int run_covered(const FuzzInput& input, CheckResult* result) {
  begin_coverage();
  *result = check_input(input, nullptr);
  return end_coverage();
}

struct FuzzStats {
  int64_t runs = 0, indexed = 0, outside = 0, corrupt = 0, lax = 0, patched = 0, patch_found = 0;

  void add(const CheckResult& result, bool has_patches) {
    ++runs;
    if (!result.parsed) return;
    indexed += result.seek == SeekResult::kIndexed;
    outside += result.seek == SeekResult::kOutsideProfile;
    corrupt += result.seek == SeekResult::kCorrupt;
    lax += result.lax;
    patched += has_patches && result.seek == SeekResult::kIndexed;
    patch_found += result.failures != 0;
  }
  void print(double seconds, size_t corpus) const {
    std::printf(
        "%.0f s: %lld runs, %lld indexed, %lld outside, %lld corrupt (%lld of these libzstd takes);"
        " %lld damaged once indexed, %lld of these reported; %d edges, corpus %zu\n",
        seconds, static_cast<long long>(runs), static_cast<long long>(indexed),
        static_cast<long long>(outside), static_cast<long long>(corrupt),
        static_cast<long long>(lax), static_cast<long long>(patched),
        static_cast<long long>(patch_found), covered_edges(), corpus);
    std::fflush(stdout);
  }
};

// One of two, the smaller: those are faster.
const FuzzInput& some_input(Random& random, const std::vector<FuzzInput>& inputs) {
  const FuzzInput& a = inputs[random.below(inputs.size())];
  const FuzzInput& b = inputs[random.below(inputs.size())];
  return a.payload.size() < b.payload.size() ? a : b;
}

FuzzInput next_input(Random& random, const std::vector<FuzzInput>& inputs) {
  FuzzInput input;
  if (inputs.empty() || random.one_in(20)) {
    VariantCounts unused;
    input.payload = random_payload(random, unused).bytes;
  } else {
    input = some_input(random, inputs);
  }
  const FuzzInput other = inputs.empty() ? input : some_input(random, inputs);
  for (uint64_t i = 1 + random.below(4); i > 0; --i) mutate(random, other, &input);
  return input;
}

int run_fuzz(const Options& options) {
  const Corpus corpus(options.corpus);
  std::vector<FuzzInput> inputs;
  FuzzStats stats;
  const auto run = [&](const FuzzInput& input) {
    CheckResult result;
    const int found = run_covered(input, &result);
    stats.add(result, !input.patches.empty());
    return found;
  };
  for (auto& [name, input] : corpus.read()) {
    run(input);
    inputs.push_back(std::move(input));
  }
  stats.print(0, inputs.size());
  Random random(options.seed);
  const Clock::time_point start = Clock::now();
  double next_report = 60;
  for (double now = 0; now < options.seconds; now = seconds_since(start)) {
    const FuzzInput input = next_input(random, inputs);
    if (run(input) != 0) {
      if (input.nbytes() <= kMostKept && !corpus.add(input)) fail("the corpus cannot be written");
      inputs.push_back(input);
    }
    if (now < next_report) continue;
    stats.print(now, inputs.size());
    next_report += 60;
  }
  stats.print(seconds_since(start), inputs.size());
  return 0;
}

// Greedily: the smallest inputs first, and each that reaches what those before it do not.
int run_minimize(const Options& options) {
  const Corpus corpus(options.corpus);
  auto inputs = corpus.read();
  const auto failed_once = [](const auto& named) {
    return named.first.rfind("regression-", 0) == 0;
  };
  const auto rank = [&](const auto& named) {
    return std::make_pair(!failed_once(named), named.second.nbytes());
  };
  std::stable_sort(inputs.begin(), inputs.end(),
                   [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  size_t kept = 0, nbytes = 0;
  for (const auto& named : inputs) {
    CheckResult result;
    const bool is_new = named.second.nbytes() <= kMostKept && run_covered(named.second, &result);
    if (is_new || failed_once(named)) {
      ++kept;
      nbytes += named.second.nbytes();
    } else {
      corpus.remove(named.first);
    }
  }
  std::printf("kept %zu of %zu inputs, %zu bytes, %d edges\n", kept, inputs.size(), nbytes,
              covered_edges());
  return 0;
}

int run_files(const Options& options) {
  for (const std::string& path : options.files) {
    ByteVector bytes;
    FuzzInput input;
    if (!read_file(path, &bytes) || !FuzzInput::from_bytes(bytes, &input)) {
      std::fprintf(stderr, "seek_fuzz: cannot read %s\n", path.c_str());
      return 2;
    }
    const CheckResult result = check_input(input, nullptr);
    std::printf("%s: %s, failures %d\n", path.c_str(),
                !result.parsed                        ? "no payload"
                : result.seek == SeekResult::kIndexed ? "indexed"
                : result.seek == SeekResult::kCorrupt ? "corrupt"
                                                      : "outside",
                result.failures);
  }
  return 0;
}

bool parse_options(int argc, char** argv, Options* options) {
  if (argc < 2) return false;
  options->mode = argv[1];
  for (int i = 2; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      options->files.push_back(name);
      continue;
    }
    if (++i == argc) return false;
    if (name == "--count") {
      options->count = std::atoll(argv[i]);
    } else if (name == "--seconds") {
      options->seconds = std::atof(argv[i]);
    } else if (name == "--seed") {
      options->seed = std::strtoull(argv[i], nullptr, 10);
    } else if (name == "--corpus") {
      options->corpus = argv[i];
    } else {
      return false;
    }
  }
  const bool needs_corpus = options->mode == "fuzz" || options->mode == "minimize";
  return !needs_corpus || !options->corpus.empty();
}

int main_of(int argc, char** argv) {
  Options options;
  if (parse_options(argc, argv, &options)) {
    __sanitizer_set_death_callback(save_failed_input);
    if (options.mode == "frames") return run_frames(options);
    if (options.mode == "fuzz") return run_fuzz(options);
    if (options.mode == "minimize") return run_minimize(options);
    if (options.mode == "run") return run_files(options);
  }
  std::fprintf(stderr,
               "usage: seek_fuzz frames [--count N] [--seed S]\n"
               "       seek_fuzz fuzz --corpus DIR [--seconds T] [--seed S]\n"
               "       seek_fuzz minimize --corpus DIR\n"
               "       seek_fuzz run FILE...\n");
  return 2;
}

}  // namespace
}  // namespace dcext::fuzz

int main(int argc, char** argv) { return dcext::fuzz::main_of(argc, argv); }
