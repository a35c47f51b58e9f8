#!/usr/bin/env bash
# CEPO in verl on one machine: pip install 'cepo[verl]', verl's rollout engine (vLLM) and, as verl's own example does it,
# `python examples/data_preprocess/gsm8k.py` for the data. Overrides end up in verl's config: a test composes these
# and builds the trainer from them. The launch itself (Ray, FSDP, vLLM, GPUs) has not been run.
set -euo pipefail

python -m verl.trainer.main_ppo \
    trainer.v1.trainer_mode=cepo \
    +trainer.v1.cepo.credit=cepo \
    +trainer.v1.cepo.lam=0.5 \
    algorithm.adv_estimator=grpo \
    data.train_files="$HOME/data/gsm8k/train.parquet" \
    data.val_files="$HOME/data/gsm8k/test.parquet" \
    data.train_batch_size=128 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen3-0.6B}" \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=true \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    trainer.n_gpus_per_node="${GPUS:-1}" \
    trainer.nnodes=1 \
    "$@"
