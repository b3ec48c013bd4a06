#include "codec/zstd_frame.h"

#define ZSTD_STATIC_LINKING_ONLY  // ZSTD_c_literalCompressionMode
#include <zstd.h>
#include <zstd_errors.h>

#include <memory>

namespace dcext {
namespace {

struct FreeDecoder {
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

ZSTD_DCtx* thread_decoder() {
  thread_local std::unique_ptr<ZSTD_DCtx, FreeDecoder> context(ZSTD_createDCtx());
  return context.get();
}

}  // namespace

size_t frame_bound(size_t src_size) { return ZSTD_compressBound(src_size); }

FrameEncoder::FrameEncoder(int level) : context_(ZSTD_createCCtx()) {
  if (context_ == nullptr) return;
  if (level == kLiteralsOnly) {
    ZSTD_CCtx_setParameter(context_, ZSTD_c_compressionLevel, ZSTD_minCLevel());
    ZSTD_CCtx_setParameter(context_, ZSTD_c_literalCompressionMode, ZSTD_ps_enable);
  } else {
    ZSTD_CCtx_setParameter(context_, ZSTD_c_compressionLevel, level);
  }
}

FrameEncoder::~FrameEncoder() { ZSTD_freeCCtx(context_); }

Status FrameEncoder::encode(const uint8_t* src, size_t src_size, uint8_t* dst, size_t dst_capacity,
                            size_t* frame_size) {
  if (context_ == nullptr) return Status::kOutOfMemory;
  const size_t written = ZSTD_compress2(context_, dst, dst_capacity, src, src_size);
  if (!ZSTD_isError(written)) {
    *frame_size = written;
    return Status::kOk;
  }
  switch (ZSTD_getErrorCode(written)) {
    case ZSTD_error_dstSize_tooSmall: return Status::kDstTooSmall;
    case ZSTD_error_memory_allocation: return Status::kOutOfMemory;
    default: return Status::kInternal;
  }
}

Status decode_frame(const uint8_t* src, size_t src_size, uint8_t* dst, size_t dst_size,
                    size_t dst_capacity) {
  ZSTD_DCtx* context = thread_decoder();
  if (context == nullptr) return Status::kOutOfMemory;
  const size_t written = ZSTD_decompressDCtx(context, dst, dst_capacity, src, src_size);
  return written == dst_size ? Status::kOk : Status::kCorrupt;
}

}  // namespace dcext
