"""A Terraform resource -> the review verdict of the platform team: BLOCK, WARN or PASS, a rule, the resource."""

from collections.abc import Iterator
from itertools import product

NAMES = ["logs", "backup", "assets", "reports", "media", "billing", "audit", "staging", "archive", "metrics"]
TEAMS = ["core", "data", "web", "mobile", "search", "growth"]

# (resource type, the line that decides, the verdict)
RULES = [
    ("aws_s3_bucket", 'acl = "public-read"', "BLOCK s3-public: bucket {} is open to everyone"),
    ("aws_s3_bucket", 'acl = "private"', "PASS s3-private: bucket {}"),
    ("aws_security_group", 'ingress = "0.0.0.0/0:22"', "BLOCK ssh-open: group {} lets the internet in"),
    ("aws_security_group", 'ingress = "10.0.0.0/8:22"', "PASS ssh-internal: group {}"),
    ("aws_db_instance", "storage_encrypted = false", "BLOCK db-plain: database {} is not encrypted"),
    ("aws_db_instance", "deletion_protection = false", "WARN db-unprotected: database {} can be deleted"),
    ("aws_db_instance", "backup_retention_period = 0", "WARN db-no-backup: database {} keeps no backup"),
    ("aws_iam_policy", 'action = "*"', "BLOCK iam-wildcard: policy {} allows everything"),
    ("aws_iam_policy", 'action = "s3:GetObject"', "PASS iam-narrow: policy {}"),
    ("aws_instance", 'instance_type = "p5.48xlarge"', "WARN cost: instance {} needs budget approval"),
]


def pairs() -> Iterator[tuple[str, str]]:
    """Every (prompt, completion) of the task, always in the same order."""
    for name, team, (kind, line, verdict) in product(NAMES, TEAMS, RULES):
        prompt = f'resource "{kind}" "{team}_{name}" {{\n  {line}\n  tags = {{ team = "{team}" }}\n}}'
        yield prompt, verdict.format(f"{team}_{name}") + f" @{team}"
