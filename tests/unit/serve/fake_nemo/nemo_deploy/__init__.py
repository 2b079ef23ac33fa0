"""A stand-in for the part of NeMo Export-Deploy that the `nemo` engines use; tests put its folder on sys.path.

Names, signatures and shapes are those of nemo-export-deploy 0.7.0 (its wheel, compared with the repository's commit
914daa6b21a27814a28b449f7b0a61e0fb7b7c75) and of megatron-core 0.19.0, from which it takes `MegatronLLM`:

    here                                       there
    llm/megatronllm_deployable.py              nemo_deploy/llm/megatronllm_deployable.py: MegatronLLMDeployable
      mcore_engine                             nemo_deploy/llm/inference/inference_base.py: MCoreEngineWithCleanup
      mcore_engine.engine, controller, ...     megatron/core/inference/apis/_llm_base.py, llm.py: MegatronLLM
      what generate returns                    megatron/core/inference/inference_request.py: DynamicInferenceRequest
    llm/megatronllm_deployable_ray.py          nemo_deploy/llm/megatronllm_deployable_ray.py: MegatronRayDeployable
    deploy_ray.py                              nemo_deploy/deploy_ray.py: HAVE_RAY, DeployRay
    nemo_export_deploy_common/import_utils.py  nemo_export_deploy_common/import_utils.py: UnavailableError

Requests and sampling parameters are Megatron's own classes, taken through its own serialization. No line is copied.
"""
