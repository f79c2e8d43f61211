// Schemas of the native operators. What each computes is documented at its Python function.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, library) {
  library.def(
      "pack_prompt(Tensor embedding, Tensor input_ids, Tensor cu_seqlens, Tensor prompt, Tensor? prompt_index, "
      "bool per_segment, float scale) -> Tensor");
  library.def(
      "pack_prompt_backward(Tensor grad, Tensor cu_seqlens, Tensor? prompt_index, SymInt bank_size, "
      "SymInt prompt_rows) -> Tensor");
  library.def(
      "prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
      "Tensor cu_seqlens, Tensor? prefix_index, Tensor? seed, Tensor? relative_bias, Tensor? cu_seqlens_k, "
      "SymInt prompt_rows, bool is_causal, float scale, SymInt window, bool prefix_in_window, float softcap, "
      "float dropout_p) -> (Tensor, Tensor, Tensor)");
  library.def(
      "prefix_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor prefix_key, "
      "Tensor prefix_value, Tensor out, Tensor peak_sum, Tensor cu_seqlens, Tensor? prefix_index, Tensor? seed, "
      "Tensor? relative_bias, Tensor? cu_seqlens_k, SymInt prompt_rows, bool is_causal, float scale, SymInt window, "
      "bool prefix_in_window, float softcap, float dropout_p, bool needs_query, bool needs_key, bool needs_value, "
      "bool needs_prefix_key, bool needs_prefix_value) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "alignment_loss(Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? row_weight, "
      "Tensor? row_grad, SymInt normalize, SymInt distances, float temperature, SymInt reduction, bool needs_student, "
      "bool needs_teacher, bool needs_weight, bool needs_bias, bool needs_row_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("segment_pool(Tensor hidden, Tensor cu_seqlens, int take) -> Tensor");
  library.def("segment_pool_backward(Tensor grad, Tensor cu_seqlens, SymInt rows, int take) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float offset) -> Tensor");
  library.def("rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)");
  library.def("gated(Tensor gate, Tensor up, SymInt activation) -> Tensor");
  library.def("gated_backward(Tensor grad, Tensor gate, Tensor up, SymInt activation) -> (Tensor, Tensor)");
}
