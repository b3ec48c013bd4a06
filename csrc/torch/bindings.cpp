#include <c10/util/ArrayRef.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>

#include "policy/anneal.h"
#include "policy/timeline.h"
#include "runtime/thread_pool.h"
#include "torch/ops_common.h"
#include "torch/ops_device_stream.h"
#include "torch/ops_seek.h"
#include "torch/ops_stream.h"

namespace py = pybind11;

namespace dcext {
namespace {

py::dict payload_info(const at::Tensor& payload) {
  const PayloadView view = parse_payload("dcext.payload_info", payload);
  const PayloadLayout& layout = view.layout();
  py::list chunks;
  for (int64_t i = 0; i < layout.num_chunks(); ++i) {
    const Chunk chunk = view.chunk(i);
    const Tile tile = view.tile(i);
    py::dict entry;
    entry["row"] = tile.row;
    entry["col"] = tile.col;
    entry["shape"] = py::make_tuple(tile.rows, tile.cols);
    entry["encoding"] = encoding_name(chunk.encoding);
    entry["pairs"] = chunk.filter.pairs;
    entry["low_bits"] = chunk.filter.low_bits;
    entry["width"] = chunk.width;
    entry["offset"] = chunk.offset;
    entry["nbytes"] = chunk.nbytes;
    entry["frame_nbytes"] = chunk.frame_nbytes;
    entry["exceptions"] = chunk.num_exceptions(tile);
    chunks.append(entry);
  }
  py::dict info;
  info["shape"] = py::make_tuple(layout.rows, layout.cols);
  info["codec"] = codec_name(layout.codec);
  info["level"] = layout.level;
  info["panel_rows"] = layout.panel_rows;
  info["slab_cols"] = layout.slab_cols;
  info["nbytes"] = payload.numel();
  info["chunks"] = chunks;
  return info;
}

py::tuple payload_shape(const at::Tensor& payload) {
  const PayloadView view = parse_payload("dcext.decode", payload);
  return py::make_tuple(view.layout().rows, view.layout().cols);
}

void verify_payload(const at::Tensor& payload) {
  const PayloadView view = parse_payload("dcext.verify_payload", payload);
  const py::gil_scoped_release release;
  for (int64_t i = 0; i < view.layout().num_chunks(); ++i) {
    raise_if_failed("dcext.verify_payload", verify_chunk(view, i));
  }
}

void decode_into(const at::Tensor& payload, at::Tensor out, const std::array<int64_t, 4>& region,
                 int64_t num_threads, bool verify) {
  const py::gil_scoped_release release;
  decode_out(payload, Region{region[0], region[1], region[2], region[3]}, num_threads,
             static_cast<Verify>(verify), out);
}

std::optional<at::Tensor> seek_index_released(const at::Tensor& payload, bool verify) {
  const py::gil_scoped_release release;
  return seek_index(payload, static_cast<Verify>(verify));
}

std::shared_ptr<HostStream> make_host_stream(
    const std::vector<std::string>& paths,
    const std::vector<std::tuple<std::string, int64_t, int64_t, at::Tensor, int64_t>>& payloads,
    int64_t slots_nbytes, bool page_cache) {
  std::vector<HostStream::Source> sources;
  for (const auto& [name, file, offset, payload, unit] : payloads) {
    sources.push_back({name, file, offset, payload, unit});
  }
  const auto stream = std::make_shared<HostStream>(
      paths, sources, slots_nbytes, page_cache ? PageCache::kKeep : PageCache::kBypass);
  HostStream::enter(stream);
  return stream;
}

py::dict host_stream_statistics(HostStream& stream) {
  constexpr double kSecond = 1e9;
  const StreamStatistics s = stream.stream().statistics();
  py::dict out;
  out["read_nbytes"] = s.read_nbytes;
  out["used_nbytes"] = s.used_nbytes;
  out["dropped_nbytes"] = s.dropped_nbytes;
  out["layers"] = s.uses;
  out["pieces"] = s.pieces;
  out["stalls"] = s.stalls;
  out["stall_s"] = static_cast<double>(s.stall_ns) / kSecond;
  out["reading_s"] = static_cast<double>(s.reading_ns) / kSecond;
  out["peak_nbytes"] = s.peak_slots * stream.slot_nbytes();
  return out;
}

void bind_host_stream(py::module_& m) {
  py::class_<HostStream, std::shared_ptr<HostStream>>(m, "HostStream")
      .def(py::init(&make_host_stream), py::arg("paths"), py::arg("payloads"),
           py::arg("slots_nbytes"), py::arg("page_cache"))
      .def_property_readonly("handle", &HostStream::handle)
      .def_property_readonly("slots_nbytes", &HostStream::slots_nbytes)
      .def_property_readonly("is_direct", &HostStream::is_direct)
      .def_property_readonly("is_usable", &HostStream::is_usable)
      .def("statistics", &host_stream_statistics)
      .def("read_all", &HostStream::read_all, py::call_guard<py::gil_scoped_release>())
      .def("close", [](HostStream& stream) { stream.stream().close(); });
}

py::dict device_stream_statistics(const TensorStream& stream) {
  const DeviceStreamStatistics statistics = stream.stream().statistics();
  py::dict result;
  result["begins"] = statistics.begins;
  result["hits"] = statistics.hits;
  result["late"] = statistics.late;
  result["copied_nbytes"] = statistics.copied_nbytes;
  result["stall_ns"] = statistics.stall_ns;
  return result;
}

void bind_device_stream(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> kReleased;
  py::class_<TensorStream, std::shared_ptr<TensorStream>>(m, "DeviceStream")
      .def(py::init(&TensorStream::open), py::arg("host"), py::arg("decoded"), py::arg("slots"),
           py::arg("ring"), py::arg("disk_stream"), py::arg("disk"), py::arg("max_ahead_nbytes"),
           py::arg("ahead_in_captures"))
      .def_property_readonly("handle", &TensorStream::handle)
      .def("statistics", &device_stream_statistics)
      .def("join", &TensorStream::join, kReleased)
      .def("close", &TensorStream::close, kReleased);
}

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

Reads reads_of(const char* op, double bytes_per_s, int64_t slots, int64_t slot_nbytes) {
  TORCH_CHECK_VALUE(bytes_per_s > 0 && slots >= 1 && slot_nbytes >= 1, op,
                    ": expected a disk's rate above 0 and at least 1 slot of 1 byte, got ",
                    bytes_per_s, " bytes per second and ", slots, " slots of ", slot_nbytes);
  return {bytes_per_s, slots, slot_nbytes};
}

double pass_seconds(const Array<double>& compute_s, const Array<int64_t>& read_nbytes,
                    double bytes_per_s, int64_t slots, int64_t slot_nbytes) {
  const Reads reads = reads_of("dcext.pass_seconds", bytes_per_s, slots, slot_nbytes);
  TORCH_CHECK_VALUE(
      compute_s.ndim() == 1 && read_nbytes.ndim() == 1 && read_nbytes.size() == compute_s.size(),
      "dcext.pass_seconds: read_nbytes: expected one for each of ", compute_s.size(),
      " layers, got ", read_nbytes.size());
  std::vector<Layer> layers;
  for (py::ssize_t i = 0; i < compute_s.size(); ++i) {
    layers.push_back({compute_s.at(i), read_nbytes.at(i)});
  }
  return Timeline(reads).pass_s(layers);
}

Array<int64_t> anneal_tiers(const Array<double>& compute_s, const Array<int64_t>& read_nbytes,
                            const Array<int64_t>& memory_nbytes, const Array<double>& weights,
                            int64_t budget_nbytes, double bytes_per_s, int64_t slots,
                            int64_t slot_nbytes, const Array<int64_t>& choice, int64_t steps,
                            uint64_t seed) {
  constexpr const char* kOp = "dcext.anneal_tiers";
  const Reads reads = reads_of(kOp, bytes_per_s, slots, slot_nbytes);
  TORCH_CHECK_VALUE(compute_s.ndim() == 3 && compute_s.size() > 0, kOp,
                    ": compute_s: expected (units, tiers, workloads), at least 1 of each, got ",
                    compute_s.ndim(), " dimensions with ", compute_s.size(), " values");
  const int64_t units = compute_s.shape(0), tiers = compute_s.shape(1);
  const int64_t workloads = compute_s.shape(2);
  for (const auto* table : {&read_nbytes, &memory_nbytes}) {
    const c10::ArrayRef<py::ssize_t> shape(table->shape(), static_cast<size_t>(table->ndim()));
    TORCH_CHECK_VALUE(table->ndim() == 2 && shape[0] == units && shape[1] == tiers, kOp,
                      ": read_nbytes, memory_nbytes: expected (units, tiers) as compute_s has, [",
                      units, ", ", tiers, "], got ", shape);
  }
  TORCH_CHECK_VALUE(weights.size() == workloads && choice.size() == units, kOp,
                    ": weights, choice: expected ", workloads, " and ", units, " of them, got ",
                    weights.size(), " and ", choice.size());
  std::vector<int64_t> chosen(choice.data(), choice.data() + units);
  for (const int64_t tier : chosen) {
    TORCH_CHECK_VALUE(tier >= 0 && tier < tiers, kOp, ": choice: expected 0 to ", tiers - 1,
                      ", got ", tier);
  }
  {
    const py::gil_scoped_release release;
    chosen = anneal({units, tiers, workloads, compute_s.data(), read_nbytes.data(),
                     memory_nbytes.data(), weights.data(), budget_nbytes, reads},
                    chosen, steps, seed);
  }
  return Array<int64_t>(units, chosen.data());
}

void bind_policy(py::module_& m) {
  m.def("pass_seconds", &pass_seconds, py::arg("compute_s"), py::arg("read_nbytes"),
        py::arg("bytes_per_s"), py::arg("slots"), py::arg("slot_nbytes"));
  m.def("anneal_tiers", &anneal_tiers, py::arg("compute_s"), py::arg("read_nbytes"),
        py::arg("memory_nbytes"), py::arg("weights"), py::arg("budget_nbytes"),
        py::arg("bytes_per_s"), py::arg("slots"), py::arg("slot_nbytes"), py::arg("choice"),
        py::arg("steps"), py::arg("seed"));
}

void set_num_threads(int num_threads) {
  TORCH_CHECK_VALUE(num_threads >= 1, "set_num_threads: expected at least 1, got ", num_threads);
  default_pool().resize(num_threads);
}

std::vector<std::string> supported_isa_names() {
  std::vector<std::string> names;
  for (const Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  Isa isa;
  TORCH_CHECK_VALUE(parse_isa(name.c_str(), &isa) && isa_supported(isa),
                    "set_isa: expected one of ", c10::ArrayRef<std::string>(supported_isa_names()),
                    ", got '", name, "'");
  set_selected_isa(isa);
}

}  // namespace
}  // namespace dcext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace dcext;
  static py::object format_error = py::module_::import("dcext.errors").attr("FormatError");
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const FormatError& error) {
      py::set_error(format_error, error.what_without_backtrace());
    }
  });

  m.def("payload_info", &payload_info, py::arg("payload"));
  m.def("payload_shape", &payload_shape, py::arg("payload"));
  m.def("verify_payload", &verify_payload, py::arg("payload"));
  m.def("decode_into", &decode_into, py::arg("payload"), py::arg("out"), py::arg("region"),
        py::arg("num_threads"), py::arg("verify"));
  m.def("seek_index", &seek_index_released, py::arg("payload"), py::arg("verify"));
  m.def("empty_weights", &empty_weights, py::arg("nbytes"));
  bind_host_stream(m);
  bind_device_stream(m);
  bind_policy(m);
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
  m.def("get_num_threads", [] { return default_pool().num_threads(); });
  m.def("available_cpus", &available_cpus);
  m.def("supported_isas", &supported_isa_names);
  m.def("selected_isa", [] { return isa_name(selected_isa()); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.attr("zstd_version") = ZSTD_versionString();
#ifdef DCEXT_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  selected_isa();  // a wrong DCEXT_CPU is an error at import, not in the middle of a forward pass
}
