// Schemas of the native operators. What each computes is documented at its Python function.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, library) {
  library.def(
      "pack_prompt(Tensor embedding, Tensor input_ids, Tensor cu_seqlens, Tensor prompt, Tensor? prompt_index, "
      "bool per_segment, float scale) -> Tensor");
  library.def(
      "pack_prompt_backward(Tensor grad, Tensor cu_seqlens, Tensor? prompt_index, SymInt bank_size, "
      "SymInt prompt_rows) -> Tensor");
}
