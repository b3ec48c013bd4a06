#include "huffman_writer.h"

extern "C" {
#define FSE_STATIC_LINKING_ONLY
#include <common/error_private.h>
#include <common/fse.h>
}

#include <algorithm>
#include <numeric>

namespace dcext::fuzz {
namespace {

// Depths of the leaves of a random binary tree. A chain down to `deepest` comes first; then leaves are split, either
// anywhere or, for skewed codes, the most recent ones.
std::vector<int> random_depths(Random& random, int num_leaves, int deepest) {
  std::vector<int> depths{0};
  for (int depth = 0; depth < deepest; ++depth) {
    depths.back() = depth + 1;
    depths.push_back(depth + 1);
  }
  const bool skewed = random.one_in(3);
  while (static_cast<int>(depths.size()) < num_leaves) {
    size_t leaf = skewed ? depths.size() - 1 : random.below(depths.size());
    while (depths[leaf] == deepest) leaf = (leaf + depths.size() - 1) % depths.size();
    ++depths[leaf];
    depths.push_back(depths[leaf]);
  }
  return depths;
}

// Distinct bytes: the lowest, those around zero as weights are, or any.
std::vector<int> random_symbols(Random& random, int n) {
  std::vector<int> symbols(256);
  std::iota(symbols.begin(), symbols.end(), 0);
  const uint64_t kind = random.below(3);
  if (kind == 1) {
    for (int i = 0; i < 256; ++i) symbols[i] = (i - n / 2) & 255;
  } else if (kind == 2) {
    for (int i = 0; i < n; ++i) std::swap(symbols[i], symbols[random.between(i, 255)]);
  }
  symbols.resize(static_cast<size_t>(n));
  return symbols;
}

ByteVector listed_weights(const HuffmanCode& code) {
  ByteVector weights;  // the last one follows from the others
  for (int i = 0; i < code.last_symbol; ++i)
    weights.push_back(static_cast<uint8_t>(code.weight(i)));
  return weights;
}

}  // namespace

HuffmanCode random_code(Random& random, int num_symbols, int table_log) {
  HuffmanCode code;
  code.table_log = table_log;
  code.num_symbols = num_symbols;
  std::vector<int> depths = random_depths(random, num_symbols, table_log);
  for (size_t i = depths.size() - 1; i > 0; --i) std::swap(depths[i], depths[random.below(i + 1)]);
  const std::vector<int> symbols = random_symbols(random, num_symbols);
  for (int i = 0; i < num_symbols; ++i) {
    code.lengths[symbols[i]] = static_cast<uint8_t>(depths[i]);
    code.last_symbol = std::max(code.last_symbol, symbols[i]);
  }
  for (int weight = 1; weight <= table_log; ++weight) {
    for (int symbol = 0; symbol < 256; ++symbol) {
      if (code.weight(symbol) != weight) continue;
      code.codes[symbol] = static_cast<uint16_t>(code.entries.size() >> (weight - 1));
      code.entries.insert(code.entries.end(), size_t{1} << (weight - 1),
                          static_cast<uint8_t>(symbol));
    }
  }
  return code;
}

bool describe_directly(const HuffmanCode& code, ByteVector* dst) {
  const ByteVector weights = listed_weights(code);
  if (weights.size() > 128) return false;
  dst->push_back(static_cast<uint8_t>(127 + weights.size()));
  for (size_t i = 0; i < weights.size(); i += 2) {
    const int second = i + 1 < weights.size() ? weights[i + 1] : 0;
    dst->push_back(static_cast<uint8_t>(weights[i] << 4 | second));
  }
  return true;
}

bool describe_by_fse(const HuffmanCode& code, int fse_log, ByteVector* dst) {
  const ByteVector weights = listed_weights(code);
  unsigned counts[16] = {}, highest = 0;
  for (const uint8_t weight : weights) {
    ++counts[weight];
    highest = std::max<unsigned>(highest, weight);
  }
  short normalized[16];
  const unsigned log = static_cast<unsigned>(fse_log);
  const size_t made = FSE_normalizeCount(normalized, log, counts, weights.size(), highest, 0);
  if (ERR_isError(made) || made == 0) return false;
  uint8_t buffer[512];
  const size_t head = FSE_writeNCount(buffer, sizeof(buffer), normalized, highest, log);
  if (ERR_isError(head)) return false;
  FSE_CTable table[FSE_CTABLE_SIZE_U32(6, 15)];
  unsigned workspace[FSE_BUILD_CTABLE_WORKSPACE_SIZE_U32(15, 6)];
  if (ERR_isError(
          FSE_buildCTable_wksp(table, normalized, highest, log, workspace, sizeof(workspace)))) {
    return false;
  }
  const size_t body = FSE_compress_usingCTable(buffer + head, sizeof(buffer) - head, weights.data(),
                                               weights.size(), table);
  if (ERR_isError(body) || body == 0 || head + body >= 128) return false;
  dst->push_back(static_cast<uint8_t>(head + body));
  dst->insert(dst->end(), buffer, buffer + head + body);
  return true;
}

void append_stream(const HuffmanCode& code, const uint8_t* symbols, int64_t n, ByteVector* dst) {
  uint64_t bits = 0;
  int count = 0;
  const auto append = [&](uint64_t value, int length) {
    bits |= value << count;
    for (count += length; count >= 8; count -= 8, bits >>= 8) {
      dst->push_back(static_cast<uint8_t>(bits));
    }
  };
  for (int64_t i = n - 1; i >= 0; --i) append(code.codes[symbols[i]], code.lengths[symbols[i]]);
  append(1, 1);
  if (count > 0) dst->push_back(static_cast<uint8_t>(bits));
}

}  // namespace dcext::fuzz
