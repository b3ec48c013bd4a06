// Runs cuda/decode_indexed_kernel.cuh, unchanged, on threads of this CPU.
//
// Usage: decode_indexed JOBS RESULTS [reversed]
//
// Numbers are int64, in this machine's order. JOBS: number of launches; for each the number of its jobs; for each job
// rows, cols, payload_nbytes and num_blocks, then the payload and the index. RESULTS: for each launch the failure word,
// then its matrices, whose bytes were 0x5a before.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/decode_indexed_kernel.cuh"

namespace {

using dcext::SeekBlock;

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (file_ == nullptr) emulated::stop("a file that cannot be opened");
  }
  ~File() { std::fclose(file_); }

  void read(void* dst, size_t nbytes) {
    if (std::fread(dst, 1, nbytes, file_) != nbytes) emulated::stop("a file that is too short");
  }
  void write(const void* src, size_t nbytes) {
    if (std::fwrite(src, 1, nbytes, file_) != nbytes) emulated::stop("a disk that is full");
  }
  int64_t read_number() {
    int64_t number = 0;
    read(&number, sizeof(number));
    return number;
  }

 private:
  std::FILE* file_;
};

// Buffers of exactly the sizes that the kernel is told, so that the sanitizer knows where they end.
struct Job {
  std::unique_ptr<uint8_t[]> payload;
  std::vector<SeekBlock> blocks;
  std::unique_ptr<int8_t[]> out;
  int64_t rows, cols, payload_nbytes;

  explicit Job(File* file) {
    rows = file->read_number();
    cols = file->read_number();
    payload_nbytes = file->read_number();
    blocks.resize(static_cast<size_t>(file->read_number()));
    payload.reset(new uint8_t[payload_nbytes]);
    out.reset(new int8_t[rows * cols]);
    file->read(payload.get(), static_cast<size_t>(payload_nbytes));
    file->read(static_cast<void*>(blocks.data()), blocks.size() * sizeof(SeekBlock));
    std::memset(out.get(), 0x5a, static_cast<size_t>(rows * cols));
  }

  dcext::DecodeJob as_argument() const {
    return {{payload.get(), static_cast<uint64_t>(payload_nbytes), out.get(),
             static_cast<uint64_t>(rows), static_cast<uint64_t>(cols)},
            blocks.data(),
            static_cast<int64_t>(blocks.size())};
  }
};

void run_launch(File* src, File* dst, bool reversed) {
  std::vector<Job> jobs;
  const int64_t num_jobs = src->read_number();
  if (num_jobs > dcext::kMaxDecodeJobs) emulated::stop("more jobs than a launch takes");
  dcext::Jobs argument{};
  int64_t num_blocks = 0;
  for (int64_t i = 0; i < num_jobs; ++i) {
    jobs.emplace_back(src);
    argument.jobs[i] = jobs.back().as_argument();
    argument.first_block[i] = num_blocks;
    num_blocks += argument.jobs[i].num_blocks;
  }
  argument.count = static_cast<int>(num_jobs);
  const std::unique_ptr<int32_t> failures(new int32_t(0));
  emulated::launch(num_blocks, dcext::kThreads, reversed,
                   [&] { dcext::decode_indexed_kernel(argument, failures.get()); });
  const int64_t found = *failures;
  dst->write(&found, sizeof(found));
  for (const Job& job : jobs) dst->write(job.out.get(), static_cast<size_t>(job.rows * job.cols));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) emulated::stop("expected JOBS RESULTS [reversed]");
  File src(argv[1], "rb"), dst(argv[2], "wb");
  const bool reversed = argc > 3 && std::strcmp(argv[3], "reversed") == 0;
  const int64_t num_launches = src.read_number();
  for (int64_t i = 0; i < num_launches; ++i) run_launch(&src, &dst, reversed);
  return 0;
}
