"""The interfaces of other projects on top of the client: the Run:ai Model Streamer's, vLLM's, SGLang's,
safetensors'.

run_ai         the Run:ai Model Streamer's interface; `run_ai_files` is its part for files
safe_open      the safetensors library's interface: `safe_file` reads a file, `safe_parts` makes arrays,
               `safe_errors` has the errors
safe_patch     puts it in the library's place
vllm           vLLM's plugin; `vllm_loader` loads, by `vllm_options`, what `vllm_needs` says; `vllm_own` has
               what is left to vLLM's own loader. `vllm_remote`, `vllm_files` and `vllm_lora` are for models
               in object storage
sglang         SGLang's plugin; `sglang_loader` loads
written        finds parameters that got nothing
ambient        finds a daemon, or starts one
ranks          which ranks share a load; `engine_ranks` for engines

Nothing in the client imports this, except the lazy names of `penstock.client`.
"""
