"""One example per command, shown by its `--help`, with the names that README.md uses."""

import typer

EXAMPLES = {
    "approve": "adaptory approve acme/sql-migration:1.1.0 --to prod",
    "audit": "adaptory audit --subject 'acme/sql-migration@*'",
    "audit checkpoint": "adaptory audit checkpoint --key audit.pem",
    "audit export": "adaptory audit export --since 2026-12-01 --format cef",
    "audit verify": "adaptory audit verify checkpoint.json --key audit.pub",
    "backup": "adaptory backup /backup/adaptory --keep 14",
    "base add": "adaptory base add .demo/base --name smollm2",
    "base deprecate": "adaptory base deprecate smollm2 --reason 'smollm3 is out'",
    "base list": "adaptory base list",
    "base show": "adaptory base show smollm2",
    "base unalias": "adaptory base unalias HuggingFaceTB/SmolLM2-135M-Instruct",
    "base upgrade": "adaptory base upgrade smollm2 smollm3 --plan",
    "cancel": "adaptory cancel 1",
    "channel delete": "adaptory channel delete acme/sql-migration@prdo",
    "combine": """adaptory combine --adapter examples/adapters/sql-migration \\
  --adapter examples/adapters/terraform-review -o .demo/both""",
    "compose": "adaptory compose examples/assistant.yaml --plan",
    "conflicts": "adaptory conflicts acme/sql-migration acme/terraform-review --probe 8",
    "convert": "adaptory convert kohya.safetensors --base .demo/base -o .demo/converted",
    "deprecate": """adaptory deprecate acme/sql-migration:1.0.0 --reason 'old dialect' \\
  --successor acme/sql-migration:1.1.0""",
    "diff": "adaptory diff acme/sql-migration:1.0.0 acme/sql-migration:1.1.0",
    "doctor": "adaptory doctor --bundle report.zip",
    "evidence": "adaptory evidence acme/sql-migration --suite sql-exact",
    "eval": """adaptory eval acme/sql-migration acme/terraform-review smollm2 \\
  --suite sql-exact --suite guard-general""",
    "export": "adaptory export acme/sql-migration:1.0.0 hf://acme/sql-migration --private",
    "extract": """adaptory extract --base .demo/base \\
  --finetuned .demo/assistant -o .demo/extracted""",
    "fsck": "adaptory fsck --full",
    "gate": """adaptory gate acme/sql-migration@prod \\
  --rule 'sql-exact.accuracy >= 0.3'""",
    "follow": "adaptory follow acme/sql-migration@prod --exec './reload.sh'",
    "gc": "adaptory gc --dry-run",
    "history": "adaptory history acme/sql-migration@prod",
    "import": "adaptory import hf://acme/sql-lora@main acme/sql-lora:1.0.0",
    "inspect": "adaptory inspect examples/adapters/sql-migration --base .demo/base",
    "jobs": "adaptory jobs --limit 5",
    "list": "adaptory list",
    "log": "adaptory log acme/sql-migration",
    "login": "adaptory login https://adapters.example",
    "logout": "adaptory logout adapters.example",
    "merge": """adaptory merge --base .demo/base \\
  --adapter examples/adapters/sql-migration=0.5 -o .demo/merged""",
    "migrate": "adaptory migrate",
    "mirror": """adaptory mirror acme/sql-migration@prod ./served \\
  --server vllm=http://localhost:8000""",
    "namespace grant": "adaptory namespace grant acme pia publisher",
    "namespace list": "adaptory namespace list",
    "namespace members": "adaptory namespace members acme",
    "namespace quota": "adaptory namespace quota acme --bytes 500000000000 --releases 1000",
    "namespace retention": "adaptory namespace retention acme --yanked 30 --prereleases 90",
    "namespace revoke": "adaptory namespace revoke acme pia",
    "namespace set": "adaptory namespace set acme --public",
    "namespace usage": "adaptory namespace usage acme",
    "inbox": "adaptory inbox",
    "change approve": "adaptory change approve acme 12",
    "change cancel": "adaptory change cancel acme 12",
    "change list": "adaptory change list acme",
    "change show": "adaptory change show acme 12",
    "policy except": "adaptory policy except acme/sql@prod --until 2027-01-31 --reason urgent",
    "policy list": "adaptory policy list acme",
    "policy set": "adaptory policy set acme/sql-migration@prod examples/policies/prod.yaml",
    "policy show": "adaptory policy show acme/sql-migration@prod",
    "profile list": "adaptory profile list",
    "profile use": "adaptory profile use local",
    "promote": "adaptory promote acme/sql-migration:1.1.0 --to prod",
    "promotion cancel": "adaptory promotion cancel acme/sql-migration@prod",
    "promotion list": "adaptory promotion list acme/sql-migration@prod",
    "publisher add": """adaptory publisher add acme/sql-migration --issuer github \\
  --project acme/training --workflow release.yml --ref refs/heads/main""",
    "publisher list": "adaptory publisher list acme/sql-migration",
    "publisher remove": "adaptory publisher remove acme/sql-migration 1a2b3c4d5e6f",
    "pull": "adaptory pull acme/sql-migration@prod -o .demo/pulled",
    "push": """adaptory push examples/adapters/sql-migration \\
  acme/sql-migration:1.0.0 --base smollm2""",
    "recipe import": "adaptory recipe import mergekit.yaml -o recipe.yaml",
    "router": "adaptory router acme/assistants@prod -o router.py",
    "route": "adaptory route ./served --listen 0.0.0.0:8080",
    "restore": "adaptory restore /backup/adaptory",
    "rollback": "adaptory rollback acme/sql-migration@prod --reason 'wrong quoting'",
    "watch": "adaptory watch acme/sql-migration@prod",
    "rollout forget": "adaptory rollout forget acme prod/gpu-7",
    "rollout status": "adaptory rollout status acme/sql-migration@prod",
    "score delete": "adaptory score delete acme/sql-migration sql-exact.accuracy",
    "score import": "adaptory score import acme/sql-migration:1.0.0",
    "search": "adaptory search --base smollm2 --score 'sql-exact.accuracy>=0.3'",
    "serve": "adaptory serve --port 8470",
    "show": "adaptory show acme/sql-migration@prod",
    "sign": "adaptory sign acme/assistant --key ~/.config/adaptory/key.pem",
    "storage check": "adaptory storage check",
    "suite add": "adaptory suite add examples/suites/*.yaml",
    "suite guard": "adaptory suite guard smollm2 -o guard.yaml",
    "suite list": "adaptory suite list",
    "suite share": "adaptory suite share acme/guard-general",
    "tame": """adaptory tame acme/sql-migration --as acme/sql-tame:1.0.0 \\
  --guard guard-general""",
    "takedown": "adaptory takedown acme/sql-migration:1.0.0 --reason 'customer data'",
    "token create": "adaptory token create --user pia --scope acme=publisher",
    "token list": "adaptory token list",
    "token revoke": "adaptory token revoke 1a2b3c4d5e6f",
    "unyank": "adaptory unyank acme/sql-migration:1.0.0 --reason 'quoting is fixed'",
    "user show": "adaptory user show pia",
    "user link": "adaptory user link ann --subject 248289761001",
    "user remove": "adaptory user remove pia",
    "verify": "adaptory verify acme/assistant-merged --rebuild",
    "webhook add": """adaptory webhook add https://ops.example/hooks --namespace acme \\
  --event channel.moved --event promotion.waiting""",
    "webhook deliveries": "adaptory webhook deliveries 1a2b3c4d5e6f --state dead",
    "webhook list": "adaptory webhook list",
    "webhook remove": "adaptory webhook remove 1a2b3c4d5e6f",
    "webhook replay": "adaptory webhook replay 1a2b3c4d5e6f --all-dead",
    "webhook rotate": "adaptory webhook rotate 1a2b3c4d5e6f",
    "webhook test": "adaptory webhook test 1a2b3c4d5e6f",
    "whoami": "adaptory whoami",
    "worker": "adaptory worker",
    "worker-key list": "adaptory worker-key list",
    "worker-key revoke": "adaptory worker-key revoke 3f1c9a0e77b2",
    "yank": "adaptory yank acme/sql-migration:1.0.0 --reason 'wrong quoting'",
}


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Adds its example to each command below `app`."""
    for command in app.registered_commands:
        name = f"{group}{command.name or getattr(command.callback, '__name__', '')}"
        lines = "\n".join(f"  {line}" for line in EXAMPLES[name].splitlines())
        command.epilog = f"\b\nExample:\n{lines}"
    for part in app.registered_groups:
        if part.typer_instance is not None:
            add_examples(part.typer_instance, f"{part.name} ")
