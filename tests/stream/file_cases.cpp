#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "cases.h"
#include "faulty_source.h"
#include "pattern_file.h"
#include "watchdog.h"

namespace dcext::stress {
namespace {

constexpr int64_t kFileNbytes = 5 * 4096 + 123;
constexpr int64_t kSlotNbytes = 32768;

const char* name_of(PageCache cache) { return cache == PageCache::kKeep ? "kept" : "bypassed"; }

void expect(bool holds, const char* what, PageCache cache) {
  if (!holds) stop("%s, page cache %s", what, name_of(cache));
}

// A file of the pattern, opened, and memory to read it into.
struct OpenFile {
  const std::string path;
  const PageCache cache;
  GuardedSlots slots{1, kSlotNbytes};
  std::unique_ptr<DirectFile> file;

  OpenFile(const std::string& folder, PageCache the_cache)
      : path(folder + "/file"), cache(the_cache) {
    write_pattern(path, kFileNbytes);
    expect(DirectFile::open(path.c_str(), cache, &file).ok(), "a file that cannot be opened",
           cache);
  }
  ~OpenFile() { unlink(path.c_str()); }

  Failure read(int64_t offset, int64_t nbytes) {
    const uint8_t* data = nullptr;
    const Failure failure = file->read(offset, nbytes, slots.memory().data, &data);
    if (!failure.ok()) return failure;
    slots.slot_of(data, nbytes);
    expect(reinterpret_cast<uintptr_t>(data) % 4096 == static_cast<uint64_t>(offset) % 4096,
           "data that are not aligned as in the file", cache);
    expect(matches_pattern(data, offset, nbytes), "wrong bytes", cache);
    return failure;
  }

  void expect_changed(const char* field, const char* what) {
    const Failure failure = read(4000, 1000);
    expect(failure.status == Status::kFileChanged && std::strcmp(failure.field, field) == 0, what,
           cache);
    expect(file->check_unchanged().status == Status::kFileChanged, what, cache);
  }
};

void reads_all_parts(const std::string& folder, PageCache cache) {
  OpenFile f(folder, cache);
  expect(f.file->nbytes() == kFileNbytes, "a wrong size", cache);
  const int64_t parts[][2] = {{0, 1},       {0, 4096},        {4095, 2},
                              {1, 8191},    {0, kFileNbytes}, {kFileNbytes - 50, 50},
                              {20480, 123}, {kFileNbytes, 0}, {kFileNbytes - 1, 1}};
  for (const auto& [offset, nbytes] : parts) {
    expect(f.read(offset, nbytes).ok(), "a part that cannot be read", cache);
  }
  const Failure beyond = f.read(kFileNbytes - 50, 51);
  expect(beyond.status == Status::kFileChanged && beyond.expected == kFileNbytes + 1 &&
             beyond.found == kFileNbytes,
         "a read beyond the end", cache);
  expect(f.file->check_unchanged().ok(), "a file that did not change", cache);
}

void notices_changes(const std::string& folder, PageCache cache) {
  for (const int64_t nbytes : {int64_t{0}, int64_t{4100}, kFileNbytes - 1, kFileNbytes + 1}) {
    OpenFile f(folder, cache);
    expect(truncate(f.path.c_str(), nbytes) == 0, "a file that cannot be cut", cache);
    f.expect_changed("file bytes", "another size");
  }
  OpenFile f(folder, cache);
  const timespec times[2] = {{0, UTIME_OMIT}, {1'000'000'000, 1}};
  expect(utimensat(AT_FDCWD, f.path.c_str(), times, 0) == 0, "a time that cannot be set", cache);
  f.expect_changed("time of modification, ns", "another time of modification");
}

// Who opened a file keeps it, whatever its name means later.
void outlives_its_name(const std::string& folder, PageCache cache) {
  OpenFile f(folder, cache);
  unlink(f.path.c_str());
  expect(f.read(4000, 1000).ok(), "a file without a name", cache);
}

void missing_file_fails(const std::string& folder, PageCache cache) {
  std::unique_ptr<DirectFile> file;
  const Failure failure = DirectFile::open((folder + "/missing").c_str(), cache, &file);
  expect(failure.status == Status::kReadError && failure.found == ENOENT && file == nullptr,
         "a missing file", cache);
}

}  // namespace

int run_files(const std::string& folder) {
  for (const PageCache cache : {PageCache::kBypass, PageCache::kKeep}) {
    reads_all_parts(folder, cache);
    notices_changes(folder, cache);
    outlives_its_name(folder, cache);
    missing_file_fails(folder, cache);
    const OpenFile f(folder, cache);
    std::printf("%s: %s\n", name_of(cache), f.file->is_direct() ? "direct" : "not direct");
  }
  return 0;
}

}  // namespace dcext::stress
