#pragma once

#include <cstdint>
#include <vector>

#include "fuzz_random.h"

namespace dcext::fuzz {

using ByteVector = std::vector<uint8_t>;

/** A complete prefix code over some bytes, with codes numbered as RFC 8878, 4.2.1 says. */
struct HuffmanCode {
  int table_log = 0;  ///< bits of the longest code
  int num_symbols = 0;
  int last_symbol = 0;
  uint8_t lengths[256] = {};  ///< 0: no code
  uint16_t codes[256] = {};
  ByteVector entries;  ///< the symbol that each value of table_log bits begins with

  int weight(int symbol) const {
    return lengths[symbol] == 0 ? 0 : table_log + 1 - lengths[symbol];
  }
};

/** A random code for `num_symbols` (2 to 256) random bytes whose longest code has exactly `table_log` bits.
 *  @param table_log   between log2(num_symbols), rounded up, and min(num_symbols - 1, 12). */
HuffmanCode random_code(Random& random, int num_symbols, int table_log);

/** Appends the weights, four bits each. False, with nothing appended, where there are more than 128. */
bool describe_directly(const HuffmanCode& code, ByteVector* dst);

/** Appends the weights, coded by FSE with tables of 32 or 64 entries. False, with nothing appended, where that is not
 *  possible: all weights the same, or too few. */
bool describe_by_fse(const HuffmanCode& code, int fse_log, ByteVector* dst);

/** Appends one stream that decodes to `n` symbols; only the end mark where there are none. */
void append_stream(const HuffmanCode& code, const uint8_t* symbols, int64_t n, ByteVector* dst);

}  // namespace dcext::fuzz
