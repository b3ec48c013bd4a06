#include "pattern_file.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "watchdog.h"

namespace dcext::stress {
namespace {

constexpr int64_t kWord = sizeof(uint64_t);

// splitmix64 of the word's number
uint64_t word_at(int64_t index) {
  uint64_t z = static_cast<uint64_t>(index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

}  // namespace

void write_pattern(const std::string& path, int64_t nbytes) {
  std::vector<uint64_t> words((nbytes + kWord - 1) / kWord);
  for (size_t i = 0; i < words.size(); ++i) words[i] = word_at(static_cast<int64_t>(i));
  std::FILE* const file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) stop("cannot write %s", path.c_str());
  const size_t written = std::fwrite(words.data(), 1, static_cast<size_t>(nbytes), file);
  if (std::fclose(file) != 0 || written != static_cast<size_t>(nbytes)) stop("a disk that is full");
}

std::unique_ptr<DirectFile> open_pattern_file(const std::string& folder, int64_t nbytes,
                                              PageCache cache) {
  const std::string path = folder + "/stream_stress." + std::to_string(getpid());
  write_pattern(path, nbytes);
  std::unique_ptr<DirectFile> file;
  const Failure failure = DirectFile::open(path.c_str(), cache, &file);
  unlink(path.c_str());
  if (!failure.ok()) stop("cannot open %s: %s", path.c_str(), to_string(failure.status));
  return file;
}

bool matches_pattern(const uint8_t* data, int64_t offset, int64_t nbytes) {
  for (int64_t done = 0; done < nbytes;) {
    const int64_t at = offset + done, skipped = at % kWord;
    const int64_t count = nbytes - done < kWord - skipped ? nbytes - done : kWord - skipped;
    const uint64_t word = word_at(at / kWord);
    if (count == kWord) {
      uint64_t found;
      std::memcpy(&found, data + done, kWord);
      if (found != word) return false;
    } else if (std::memcmp(data + done, reinterpret_cast<const uint8_t*>(&word) + skipped,
                           static_cast<size_t>(count)) != 0) {
      return false;
    }
    done += count;
  }
  return true;
}

}  // namespace dcext::stress
