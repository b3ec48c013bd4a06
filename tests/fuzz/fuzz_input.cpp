#include "fuzz_input.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "base/bytes.h"
#include "base/checksum.h"

namespace dcext::fuzz {
namespace {

constexpr size_t kCountNbytes = 4, kPatchNbytes = 6;

}  // namespace

ByteVector FuzzInput::to_bytes() const {
  ByteVector bytes(kCountNbytes + patches.size() * kPatchNbytes);
  store_le(bytes.data(), static_cast<uint32_t>(patches.size()));
  uint8_t* dst = bytes.data() + kCountNbytes;
  for (const Patch& patch : patches) {
    dst[0] = patch.kind;
    store_le(dst + 1, patch.offset);
    dst[5] = patch.byte;
    dst += kPatchNbytes;
  }
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  return bytes;
}

bool FuzzInput::from_bytes(const ByteVector& bytes, FuzzInput* input) {
  if (bytes.size() < kCountNbytes) return false;
  const size_t count = load_le<uint32_t>(bytes.data());
  if ((bytes.size() - kCountNbytes) / kPatchNbytes < count) return false;
  const uint8_t* src = bytes.data() + kCountNbytes;
  input->patches.clear();
  for (size_t i = 0; i < count; ++i, src += kPatchNbytes) {
    input->patches.push_back({src[0], load_le<uint32_t>(src + 1), src[5]});
  }
  input->payload.assign(src, bytes.data() + bytes.size());
  return true;
}

bool read_file(const std::string& path, ByteVector* bytes) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  bytes->assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  return true;
}

bool write_file(const std::string& path, const ByteVector& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  return file.good();
}

std::vector<std::pair<std::string, FuzzInput>> Corpus::read() const {
  std::vector<std::pair<std::string, FuzzInput>> inputs;
  std::filesystem::create_directories(folder_);
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    ByteVector bytes;
    FuzzInput input;
    if (!read_file(entry.path().string(), &bytes)) continue;
    if (!FuzzInput::from_bytes(bytes, &input)) continue;
    inputs.emplace_back(entry.path().filename().string(), std::move(input));
  }
  std::sort(inputs.begin(), inputs.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  return inputs;
}

bool Corpus::add(const FuzzInput& input) const {
  const ByteVector bytes = input.to_bytes();
  char name[17];
  std::snprintf(name, sizeof(name), "%016llx",
                static_cast<unsigned long long>(checksum64(bytes.data(), bytes.size())));
  return write_file(folder_ + "/" + name, bytes);
}

void Corpus::remove(const std::string& name) const {
  std::filesystem::remove(folder_ + "/" + name);
}

}  // namespace dcext::fuzz
