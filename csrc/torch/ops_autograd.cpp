// What stands between callers and the kernels: gradients, and casts under autocast. Neither costs anything where it is
// not asked for: without a graph, calls go straight to the kernels, and autocast's keys are active inside autocast only.

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace dcext {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using LinearSchema = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, c10::string_view);
using LinearStreamedSchema = Tensor(const Tensor&, int64_t, int64_t, const Tensor&,
                                    const OptionalTensor&, const OptionalTensor&, c10::string_view);
using InputGradSchema = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               c10::SymInt);
using StreamedInputGradSchema = Tensor(const Tensor&, int64_t, int64_t, const Tensor&,
                                       const OptionalTensor&, c10::SymInt);

template <typename Schema>
c10::TypedOperatorHandle<Schema> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

const auto& linear_op() {
  static const auto kOp = find_op<LinearSchema>("dcext::linear");
  return kOp;
}

const auto& linear_streamed_op() {
  static const auto kOp = find_op<LinearStreamedSchema>("dcext::linear_streamed");
  return kOp;
}

const auto& input_grad_op() {
  static const auto kOp = find_op<InputGradSchema>("dcext::linear_input_grad");
  return kOp;
}

const auto& streamed_input_grad_op() {
  static const auto kOp = find_op<StreamedInputGradSchema>("dcext::linear_streamed_input_grad");
  return kOp;
}

// Where a layer's integers are: what the operators for both places take instead of each other.
struct ResidentWeight {
  Tensor payload;

  Tensor saved(AutogradContext*) const { return payload; }
  static ResidentWeight load(AutogradContext*, const Tensor& saved) { return {saved}; }
  Tensor linear(const Tensor& x, const Tensor& row_scale, const OptionalTensor& col_scale,
                const OptionalTensor& bias, c10::string_view activations) const {
    return linear_op().call(x, payload, row_scale, col_scale, bias, activations);
  }
  Tensor input_grad(const Tensor& grad, const Tensor& row_scale, const OptionalTensor& col_scale,
                    c10::SymInt in_features) const {
    return input_grad_op().call(grad, payload, row_scale, col_scale, std::move(in_features));
  }
};

struct StreamedWeight {
  int64_t stream, unit;

  Tensor saved(AutogradContext* context) const {
    context->saved_data["stream"] = stream;
    context->saved_data["unit"] = unit;
    return {};
  }
  static StreamedWeight load(AutogradContext* context, const Tensor&) {
    return {context->saved_data["stream"].toInt(), context->saved_data["unit"].toInt()};
  }
  Tensor linear(const Tensor& x, const Tensor& row_scale, const OptionalTensor& col_scale,
                const OptionalTensor& bias, c10::string_view activations) const {
    return linear_streamed_op().call(x, stream, unit, row_scale, col_scale, bias, activations);
  }
  Tensor input_grad(const Tensor& grad, const Tensor& row_scale, const OptionalTensor& col_scale,
                    c10::SymInt in_features) const {
    return streamed_input_grad_op().call(grad, stream, unit, row_scale, col_scale,
                                         std::move(in_features));
  }
};

// What both directions save and need again.
template <typename Weight>
struct SavedLayer {
  Weight weight;
  Tensor row_scale;
  OptionalTensor col_scale;

  static void save(AutogradContext* context, const Weight& weight, const Tensor& row_scale,
                   const OptionalTensor& col_scale) {
    context->save_for_backward({row_scale, col_scale.value_or(Tensor()), weight.saved(context)});
  }
  static SavedLayer load(AutogradContext* context) {
    const variable_list saved = context->get_saved_variables();
    const OptionalTensor col_scale = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    return {Weight::load(context, saved[2]), saved[0], col_scale};
  }
};

// Edges are the arguments that are tensors: the first one, row_scale, then those that are there.
void refuse_scale_grads(AutogradContext* context, const OptionalTensor& col_scale) {
  const bool wanted =
      context->needs_input_grad(1) || (col_scale.has_value() && context->needs_input_grad(2));
  TORCH_CHECK_NOT_IMPLEMENTED(
      !wanted,
      "dcext::linear: row_scale, col_scale: expected tensors that do not require grad, got one "
      "that does: gradients reach x and bias only");
}

Tensor sum_of_tokens(const Tensor& grad) {
  return grad.dim() == 1 ? grad.to(at::kFloat) : grad.flatten(0, -2).sum({0}, false, at::kFloat);
}

template <typename Weight>
struct LinearFunction : torch::autograd::Function<LinearFunction<Weight>> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& row_scale,
                        const OptionalTensor& col_scale, const OptionalTensor& bias,
                        const Weight& weight, c10::string_view activations) {
    SavedLayer<Weight>::save(context, weight, row_scale, col_scale);
    context->saved_data["in_features"] = x.sym_size(-1);
    context->saved_data["has_bias"] = bias.has_value();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return weight.linear(x, row_scale, col_scale, bias, activations);
  }

  // Of the layer with activations as they are. With quantized ones that is the straight-through estimator: rounding
  // counts as the identity.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto layer = SavedLayer<Weight>::load(context);
    refuse_scale_grads(context, layer.col_scale);
    Tensor grad_x, grad_bias;
    if (context->needs_input_grad(0)) {
      grad_x = layer.weight.input_grad(grads[0], layer.row_scale, layer.col_scale,
                                       context->saved_data["in_features"].toSymInt());
    }
    const size_t bias_edge = layer.col_scale.has_value() ? 3 : 2;
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(bias_edge)) {
      grad_bias = sum_of_tokens(grads[0]);
    }
    return {grad_x, {}, {}, grad_bias, {}, {}};
  }
};

template <typename Weight>
struct InputGradFunction : torch::autograd::Function<InputGradFunction<Weight>> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* context, const Tensor& grad, const Tensor& row_scale,
                        const OptionalTensor& col_scale, const Weight& weight,
                        c10::SymInt in_features) {
    SavedLayer<Weight>::save(context, weight, row_scale, col_scale);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return weight.input_grad(grad, row_scale, col_scale, std::move(in_features));
  }

  // It is linear in the gradient that it takes, by the transposed matrix.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto layer = SavedLayer<Weight>::load(context);
    refuse_scale_grads(context, layer.col_scale);
    Tensor grad;
    if (context->needs_input_grad(0)) {
      grad = layer.weight.linear(grads[0], layer.row_scale, layer.col_scale, std::nullopt, "none");
    }
    return {grad, {}, {}, {}, {}};
  }
};

bool is_tracked(const Tensor& tensor, bool grad_enabled) {
  return (grad_enabled && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
}

// Whether a graph is to be made; tangents of forward mode go there too, to be refused.
bool needs_graph(std::initializer_list<const Tensor*> tensors,
                 std::initializer_list<const OptionalTensor*> optionals) {
  const bool enabled = c10::GradMode::is_enabled();
  for (const Tensor* tensor : tensors) {
    if (is_tracked(*tensor, enabled)) return true;
  }
  for (const OptionalTensor* tensor : optionals) {
    if (tensor->has_value() && is_tracked(**tensor, enabled)) return true;
  }
  return false;
}

Tensor linear_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& payload,
                       const Tensor& row_scale, const OptionalTensor& col_scale,
                       const OptionalTensor& bias, c10::string_view activations) {
  if (!needs_graph({&x, &row_scale}, {&col_scale, &bias})) {
    return linear_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, payload, row_scale,
                                  col_scale, bias, activations);
  }
  return LinearFunction<ResidentWeight>::apply(x, row_scale, col_scale, bias,
                                               ResidentWeight{payload}, activations);
}

Tensor linear_streamed_autograd(c10::DispatchKeySet keys, const Tensor& x, int64_t stream,
                                int64_t unit, const Tensor& row_scale,
                                const OptionalTensor& col_scale, const OptionalTensor& bias,
                                c10::string_view activations) {
  if (!needs_graph({&x, &row_scale}, {&col_scale, &bias})) {
    return linear_streamed_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, stream,
                                           unit, row_scale, col_scale, bias, activations);
  }
  return LinearFunction<StreamedWeight>::apply(x, row_scale, col_scale, bias,
                                               StreamedWeight{stream, unit}, activations);
}

Tensor input_grad_autograd(c10::DispatchKeySet keys, const Tensor& grad, const Tensor& payload,
                           const Tensor& row_scale, const OptionalTensor& col_scale,
                           c10::SymInt in_features) {
  if (!needs_graph({&grad, &row_scale}, {&col_scale})) {
    return input_grad_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad, payload,
                                      row_scale, col_scale, std::move(in_features));
  }
  return InputGradFunction<ResidentWeight>::apply(grad, row_scale, col_scale,
                                                  ResidentWeight{payload}, std::move(in_features));
}

Tensor streamed_input_grad_autograd(c10::DispatchKeySet keys, const Tensor& grad, int64_t stream,
                                    int64_t unit, const Tensor& row_scale,
                                    const OptionalTensor& col_scale, c10::SymInt in_features) {
  if (!needs_graph({&grad, &row_scale}, {&col_scale})) {
    return streamed_input_grad_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad,
                                               stream, unit, row_scale, col_scale,
                                               std::move(in_features));
  }
  return InputGradFunction<StreamedWeight>::apply(
      grad, row_scale, col_scale, StreamedWeight{stream, unit}, std::move(in_features));
}

// As nn.Linear's: the activations take autocast's dtype. Scales and bias stay float32, as kernels take them.
Tensor autocast(const Tensor& x) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(at::kCPU), x, at::kCPU);
}

Tensor linear_autocast(const Tensor& x, const Tensor& payload, const Tensor& row_scale,
                       const OptionalTensor& col_scale, const OptionalTensor& bias,
                       c10::string_view activations) {
  const c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastCPU);
  return linear_op().call(autocast(x), payload, row_scale, col_scale, bias, activations);
}

Tensor linear_streamed_autocast(const Tensor& x, int64_t stream, int64_t unit,
                                const Tensor& row_scale, const OptionalTensor& col_scale,
                                const OptionalTensor& bias, c10::string_view activations) {
  const c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastCPU);
  return linear_streamed_op().call(autocast(x), stream, unit, row_scale, col_scale, bias,
                                   activations);
}

}  // namespace
}  // namespace dcext

TORCH_LIBRARY_IMPL(dcext, Autograd, m) {
  m.impl("linear", TORCH_FN(dcext::linear_autograd));
  m.impl("linear_streamed", TORCH_FN(dcext::linear_streamed_autograd));
  m.impl("linear_input_grad", TORCH_FN(dcext::input_grad_autograd));
  m.impl("linear_streamed_input_grad", TORCH_FN(dcext::streamed_input_grad_autograd));
  // All others that take floats: an exception in backward instead of gradients that are silently missing.
  for (const char* name : {"embedding", "embedding_streamed", "dequantize_weight",
                           "quantize_activations", "dequantize", "round_columns_"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(dcext, AutocastCPU, m) {
  m.impl("linear", TORCH_FN(dcext::linear_autocast));
  m.impl("linear_streamed", TORCH_FN(dcext::linear_streamed_autocast));
}
