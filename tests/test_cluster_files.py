"""The cluster files are what Ray, EC2 and Kubernetes take them for: driven through Ray's own launcher against moto."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "ray_cluster.yaml"
FILES = [CLUSTER, *(ROOT / "deploy" / name for name in ("kuberay.yaml", "aws_roles.yaml", "Dockerfile", "install.sh"))]
CHECKOUT = "/home/ray/faces2voices"
BUCKET = "arn:aws:s3:::films"


def locked(package: str) -> str:
    """The version in the lock file."""
    [version] = re.findall(rf"^{package}==(.+)$", (ROOT / "requirements.lock").read_text(), re.M)
    return version


def cluster() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return tree


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text()))


def ray_cluster() -> dict[str, Any]:
    [found] = [tree for tree in manifests() if tree["kind"] == "RayCluster"]
    return found


def words(tree: Any) -> Iterator[str]:
    """Every string in a tree, keys too."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from words(key)
            yield from words(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from words(value)
    elif isinstance(tree, str):
        yield tree


# What Ray makes of ray_cluster.yaml


def test_ray_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster())
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert prepared["head_node_type"] == "head"
    # The head takes no work, and nothing but the head costs while there is none.
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    assert types["cpu"]["min_workers"] == types["gpu"]["min_workers"] == 0
    assert types["cpu"]["max_workers"] > 0 < types["gpu"]["max_workers"]
    assert prepared["max_workers"] == types["cpu"]["max_workers"] + types["gpu"]["max_workers"]
    assert 0 < prepared["idle_timeout_minutes"] <= 60
    # A wrong key is refused, so the check above says something.
    with pytest.raises(Exception, match="Additional properties"):
        validate_config({**prepared, "max_worker": 1})


@dataclass
class Launch:
    """What `ray up` and the start of one worker of each kind asked for, in order."""

    config: dict[str, Any]
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: dict[str, list[str]] = field(default_factory=dict)
    instances: dict[str, dict[str, Any]] = field(default_factory=dict)


class Machine:
    """Stands for subprocess: notes the commands for a node, and answers as one with Docker and an NVIDIA driver."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def check_call(self, command: list[str], *_: object, **__: object) -> None:
        self.ran.append(" ".join(command))

    def check_output(self, command: list[str], *_: object, **__: object) -> bytes:
        self.check_call(command)
        answers = {
            "Config.Env": b'["HOME=/home/ray"]',
            "command -v": b"docker",
            "Runtimes": b"nvidia-container-runtime",
            "meminfo": b"MemAvailable: 30000000 kB",
            "printenv HOME": b"/home/ray",
        }
        return next((answer for word, answer in answers.items() if word in self.ran[-1]), b"")


class Resolver(yaml.SafeLoader):
    """Reads a CloudFormation template for account 123456789012 with the bucket `films`."""


def _resolve(loader: Resolver, tag: str, node: yaml.ScalarNode) -> str:
    if tag == "Sub":
        given = {"AWS::Partition": "aws", "AWS::AccountId": "123456789012", "Bucket": "films"}
        return re.sub(r"\$\{(.*?)\}", lambda name: given[name[1]], node.value)
    if node.value == "Cluster":
        return "faces2voices"
    name, _, attribute = node.value.partition(".")
    names = {"BucketPolicy": "policy/f2v-bucket", "Node": "role/f2v-node", "Head": "role/f2v-head"}
    arn = f"arn:aws:iam::123456789012:{names[name]}"
    return arn if attribute == "Arn" or name == "BucketPolicy" else names[name].partition("/")[2]


Resolver.add_multi_constructor("!", _resolve)


def make_roles() -> None:
    """The roles of deploy/aws_roles.yaml, by IAM's own checks."""
    import boto3

    iam = boto3.client("iam")
    resources = yaml.load((ROOT / "deploy/aws_roles.yaml").read_text(), Resolver)["Resources"].values()
    properties: dict[str, list[dict[str, Any]]] = {}
    for resource in resources:
        properties.setdefault(resource["Type"], []).append(resource["Properties"])
    for policy in properties["AWS::IAM::ManagedPolicy"]:
        iam.create_policy(PolicyName=policy["ManagedPolicyName"], PolicyDocument=json.dumps(policy["PolicyDocument"]))
    for role in properties["AWS::IAM::Role"]:
        name = role["RoleName"]
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(role["AssumeRolePolicyDocument"]))
        for arn in role["ManagedPolicyArns"]:
            iam.attach_role_policy(RoleName=name, PolicyArn=arn)
        for policy in role.get("Policies", []):
            document = json.dumps(policy["PolicyDocument"])
            iam.put_role_policy(RoleName=name, PolicyName=policy["PolicyName"], PolicyDocument=document)
    for profile in properties["AWS::IAM::InstanceProfile"]:
        name = profile["InstanceProfileName"]
        iam.create_instance_profile(InstanceProfileName=name)
        for role in profile["Roles"]:
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=role)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """`ray up`, and then a worker of each kind as the head's autoscaler starts it."""
    import botocore.client
    from moto import mock_aws
    from moto.ec2.models import instance_types
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.commands import _bootstrap_config, get_or_create_head_node
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller

    start: Any = get_or_create_head_node
    home = tmp_path_factory.mktemp("home")
    calls: list[dict[str, Any]] = []
    call = botocore.client.BaseClient._make_api_call

    def note(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "RunInstances":
            calls.append(copy.deepcopy(arguments))
        return call(client, operation, arguments)

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_DEFAULT_REGION", "us-west-2")
        patch.setattr(botocore.client.BaseClient, "_make_api_call", note)
        patch.setattr(node_provider, "TAG_BATCH_DELAY", 0.01)
        # Ray asks for all types that EC2 has: seconds for answers that nobody looks at.
        few = {node["node_config"]["InstanceType"] for node in cluster()["available_node_types"].values()}
        patch.setattr(instance_types, "INSTANCE_TYPES", {name: instance_types.INSTANCE_TYPES[name] for name in few})
        make_roles()
        tree = cluster()
        # As in the folder of the file, but a small one: Ray hashes what it copies, ignored files too.
        tree["file_mounts"] = dict.fromkeys(tree["file_mounts"], str(ROOT / "deploy"))
        config = _bootstrap_config(tree, no_config_cache=True)
        found = Launch(config)

        machine = Machine()
        start(copy.deepcopy(config), str(CLUSTER), False, False, True, None, _runner=machine)
        found.asked["head"], found.ran["head"] = calls.pop(), machine.ran

        provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
        settings = AutoscalingConfig({key: value for key, value in config.items() if key != "head_node"})
        for kind in ("cpu", "gpu"):
            machine = Machine()
            tags = {"ray-node-type": "worker", "ray-user-node-type": kind, "ray-node-status": "uninitialized"}
            provider.create_node(settings.get_cloud_node_config(kind), tags, 1)
            [node] = provider.non_terminated_nodes({"ray-user-node-type": kind})
            instance = type("Instance", (), {"instance_type": kind, "cloud_instance_id": node, "instance_id": kind})
            RayInstaller(provider, settings, machine).install_ray(instance, "10.0.0.1")
            found.asked[kind], found.ran[kind] = calls.pop(), machine.ran
        for node in provider.ec2.meta.client.describe_instances()["Reservations"]:
            for instance in node["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
                found.instances[tags["ray-user-node-type"]] = {**instance, "Tags": tags}
        yield found


@pytest.mark.parametrize(
    ("kind", "type_", "role", "spot"),
    [
        ("head", "m7i.xlarge", "f2v-head", False),
        ("cpu", "m7i.4xlarge", "f2v-node", True),
        ("gpu", "g6.2xlarge", "f2v-node", True),
    ],
)
def test_what_is_asked_of_ec2(launch: Launch, kind: str, type_: str, role: str, spot: bool) -> None:
    asked, instance = launch.asked[kind], launch.instances[kind]
    assert asked["InstanceType"] == instance["InstanceType"] == type_
    assert asked["IamInstanceProfile"] == {"Name": role}
    assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{role}")
    # Spot workers; the head holds the build's own process and stays.
    assert asked.get("InstanceMarketOptions", {}).get("MarketType") == ("spot" if spot else None)
    assert instance.get("InstanceLifecycle") == ("spot" if spot else None)
    # Ray's own default is an Ubuntu of 2018, whose driver is too old for torch.
    assert asked["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver")
    assert asked["MetadataOptions"]["HttpTokens"] == "required"
    assert asked["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100
    assert (asked["MinCount"], asked["MaxCount"]) == (1, 1)
    assert instance["Tags"]["ray-cluster-name"] == "faces2voices"
    assert instance["Tags"]["project"] == "faces2voices"
    # Only nodes of the cluster, and ssh, get in.
    assert len(asked["SecurityGroupIds"]) == 1


def test_types_are_what_ec2_has(launch: Launch) -> None:
    """Ray fills in what EC2 says of each type; what the file says must not be more than there is."""
    from moto.ec2.models.instance_types import INSTANCE_TYPES

    for kind in ("cpu", "gpu"):
        node = launch.config["available_node_types"][kind]
        there = INSTANCE_TYPES[node["node_config"]["InstanceType"]]
        assert node["resources"]["CPU"] == there["VCpuInfo"]["DefaultVCpus"]
        assert node["resources"].get("GPU", 0) == sum(gpu["Count"] for gpu in there.get("GpuInfo", {}).get("Gpus", []))
        # A worker is one thread on one processor, and some take gigabytes.
        assert there["MemoryInfo"]["SizeInMiB"] / node["resources"]["CPU"] >= 4000
    assert launch.config["available_node_types"]["gpu"]["resources"]["accelerator_type:L4"] == 1
    assert "GPU" not in launch.config["available_node_types"]["cpu"]["resources"]


@pytest.mark.parametrize(("kind", "build"), [("head", "cpu"), ("cpu", "cpu"), ("gpu", "gpu")])
def test_what_runs_on_a_node(launch: Launch, kind: str, build: str) -> None:
    ran = launch.ran[kind]
    [container] = [command for command in ran if "docker run" in command]
    assert f" rayproject/ray:{locked('ray')}-py311-{build} " in container
    assert f":{CHECKOUT} " in container
    assert "--ulimit nofile=65536:65536" in container
    assert f"--env AWS_REGION={launch.config['provider']['region']} " in container
    assert "--env RAY_AUTH_MODE=disabled " in container
    assert any(f"install.sh {build}" in command for command in ran)
    assert not any(f"install.sh {'gpu' if build == 'cpu' else 'cpu'}" in command for command in ran)

    start = ran[-1]
    assert "ray start" in start
    assert "--metrics-export-port=8080" in start
    assert f'{{"f2v.node":"{kind}"}}' in start
    if kind == "head":
        assert "RAY_OVERRIDE_RESOURCES" in start
        assert '{"CPU":0}' in start
        assert "--num-cpus=0" in start
        assert "--autoscaling-config=" in start
        assert "--dashboard-host=127.0.0.1" in start
    else:
        assert "--address=$RAY_HEAD_IP:6379" in start
        assert "RAY_HEAD_IP=10.0.0.1" in start
    copies = [command for command in ran if command.startswith("rsync") and command.endswith("/faces2voices/")]
    assert copies
    for name in (".git", ".venv"):
        assert all(f"--exclude {name} " in command for command in copies)


def test_roles_open_the_bucket_and_no_more(launch: Launch) -> None:
    import boto3

    iam = boto3.client("iam")
    for name, actions in (("f2v-node", set()), ("f2v-head", {"ec2:RunInstances", "iam:PassRole"})):
        [profile] = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert profile["RoleName"] == name
        [attached] = iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        version = iam.get_policy_version(PolicyArn=attached["PolicyArn"], VersionId="v1")["PolicyVersion"]
        statements = version["Document"]["Statement"]
        assert {statement["Resource"] for statement in statements} == {BUCKET, f"{BUCKET}/*"}
        own = iam.list_role_policies(RoleName=name)["PolicyNames"]
        documents = [iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"] for policy in own]
        allowed = [statement for document in documents for statement in document["Statement"]]
        assert actions <= {word for statement in allowed for word in words(statement["Action"])}
        passed = [statement["Resource"] for statement in allowed if statement["Action"] == "iam:PassRole"]
        assert passed == (["arn:aws:iam::123456789012:role/f2v-node"] if actions else [])


def allows(policy: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    """Whether a policy of Allow statements lets an action through, by IAM's rules for what is in them here."""

    def any_matches(patterns: str | list[str], word: str) -> bool:
        return any(fnmatch(word, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))

    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        assert set(statement.get("Condition", {})) <= {"StringEquals"}
        conditions = statement.get("Condition", {}).get("StringEquals", {})
        if (
            any_matches(statement["Action"], action)
            and any_matches(statement["Resource"], resource)
            and all(context.get(key) == value for key, value in conditions.items())
        ):
            return True
    return False


def test_the_head_touches_no_machine_but_its_clusters() -> None:
    template = yaml.load((ROOT / "deploy/aws_roles.yaml").read_text(), Resolver)
    assert template["Parameters"]["Cluster"]["Default"] == cluster()["cluster_name"]
    [policy] = [own["PolicyDocument"] for own in template["Resources"]["Head"]["Properties"]["Policies"]]
    machine = "arn:aws:ec2:us-west-2:123456789012:instance/i-1"
    own, other = ({"aws:ResourceTag/ray-cluster-name": name} for name in ("faces2voices", "someone-elses"))
    start = {"ec2:CreateAction": "RunInstances"}
    assert allows(policy, "ec2:RunInstances", machine, {})
    for kind in ("instance/*", "volume/*"):
        assert allows(policy, "ec2:CreateTags", f"arn:aws:ec2:us-west-2:123456789012:{kind}", start)
    for action in ("ec2:CreateTags", "ec2:TerminateInstances"):
        assert allows(policy, action, machine, own)
        for context in ({}, other):
            assert not allows(policy, action, machine, context)
    assert not allows(policy, "ec2:CreateTags", machine, {"ec2:CreateAction": "CreateVolume"})
    assert not allows(policy, "ec2:DeleteTags", machine, own)
    node = "arn:aws:iam::123456789012:role/f2v-node"
    assert allows(policy, "iam:PassRole", node, {"iam:PassedToService": "ec2.amazonaws.com"})
    assert not allows(policy, "iam:PassRole", node, {"iam:PassedToService": "lambda.amazonaws.com"})
    assert not allows(
        policy, "iam:PassRole", node.replace("node", "head"), {"iam:PassedToService": "ec2.amazonaws.com"}
    )


def ssh_from(config: dict[str, Any]) -> set[str]:
    """Where the security group of the nodes that Ray would start lets ssh in from."""
    import boto3

    [group] = {
        each for node in config["available_node_types"].values() for each in node["node_config"]["SecurityGroupIds"]
    }
    [found] = boto3.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = [rule for rule in found["IpPermissions"] if rule.get("FromPort") == 22]
    return {place["CidrIp"] for rule in rules for place in rule["IpRanges"]}


def test_ssh_from_a_range_of_ones_own(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/cluster.md has it: Ray opens ssh to all in a group that it makes, and leaves one with rules alone."""
    import boto3
    from ray.autoscaler._private.commands import _bootstrap_config

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert ssh_from(launch.config) == {"0.0.0.0/0"}
    page = (ROOT / "docs/cluster.md").read_text()
    [name] = re.findall(r"security_group: \{GroupName: ([\w-]+)\}", page)
    [own] = re.findall(r"--cidr (\S+)", page)
    ec2 = boto3.client("ec2")
    [vpc] = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    group = ec2.create_security_group(GroupName=name, Description="x", VpcId=vpc["VpcId"])["GroupId"]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": own}]}
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, inside])
    tree = cluster()
    tree["file_mounts"] = {}
    tree["provider"]["security_group"] = {"GroupName": name}
    config = _bootstrap_config(tree, no_config_cache=True)
    assert config["available_node_types"]["cpu"]["node_config"]["SecurityGroupIds"] == [group]
    assert ssh_from(config) == {own}


def asked_nodes(tree: dict[str, Any], shared: int, plain: int) -> dict[str, int]:
    """Nodes that Ray's autoscaler starts for workers with a quarter of a GPU and without any."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(tree, skip_content_hash=True)
    wanted = [{"CPU": 1, "GPU": 0.25}] * shared + [{"CPU": 1}] * plain
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in wanted]),
    )
    return {each.instance_type: each.count for each in ResourceDemandScheduler(None).schedule(request).to_launch}


def test_settings_of_the_pages_ask_for_the_nodes_that_they_name() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import prepare_config

    said = (ROOT / "docs/cluster.md").read_text()
    lines = set(re.findall(r"--set run\.gpus=\S+ --set run\.max_gpus=\S+ --set run\.max_cpus=\S+", said))
    assert lines == {"--set run.gpus=0.25 --set run.max_gpus=4 --set run.max_cpus=28"}
    walk = (ROOT / "docs/walkthrough.md").read_text()
    assert "  gpus: 0.25\n  max_gpus: 4\n  max_cpus: 28\n" in walk
    aws = prepare_config(cluster())
    pods = prepare_config(_derive_autoscaling_config_from_ray_cr(ray_cluster()))
    for tree in (aws, pods):
        assert asked_nodes(tree, 16, 28 - 16) == {"gpu": 4}
    assert asked_nodes(aws, 0, 28) == {"cpu": 2}  # to read new videos
    assert asked_nodes(aws, 0, 128) == {"cpu": 8}


# What Ray makes of deploy/kuberay.yaml


def test_only_the_namespace_and_the_operator_reach_ray() -> None:
    [policy] = [tree["spec"] for tree in manifests() if tree["kind"] == "NetworkPolicy"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}  # KubeRay's label, on all its pods
    inside, metrics = policy["ingress"]
    assert all("podSelector" in source or "namespaceSelector" in source for source in inside["from"])
    assert metrics == {"ports": [{"port": 8080}]}


def test_rays_own_reading_of_the_manifest() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr(ray_cluster())
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert {name: node["labels"] for name, node in types.items()} == {
        "headgroup": {"f2v.node": "head"},
        "cpu": {"f2v.node": "cpu"},
        "gpu": {"f2v.node": "gpu"},
    }
    aws = cluster()
    for kind in ("cpu", "gpu"):
        assert (types[kind]["min_workers"], types[kind]["max_workers"]) == (
            aws["available_node_types"][kind]["min_workers"],
            aws["available_node_types"][kind]["max_workers"],
        )
        assert types[kind]["resources"]["memory"] / types[kind]["resources"]["CPU"] >= 3.4 * 2**30
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["resources"]["CPU"] >= 4
    assert "GPU" not in types["cpu"]["resources"]
    assert config["idle_timeout_minutes"] == aws["idle_timeout_minutes"]


OBJECT = {"type": "object", "minProperties": 1}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": WORDS, "labels": WORDS, "template": OBJECT}
COUNT = {"type": "integer", "minimum": 0}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"],
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "resources": OBJECT,
            },
        },
        "headGroupSpec": {"type": "object", "additionalProperties": False, "required": [*GROUP], "properties": GROUP},
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": [*GROUP, "groupName", "minReplicas", "maxReplicas"],
                "properties": {
                    **GROUP,
                    "groupName": {"type": "string"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                },
            },
        },
    },
}
"""The part of ray.io/v1 RayCluster that the manifest uses, by the types of KubeRay's API reference."""


def test_the_manifest_has_the_shape_of_a_ray_cluster() -> None:
    import jsonschema

    tree = ray_cluster()
    assert tree["apiVersion"] == "ray.io/v1"
    jsonschema.validate(tree["spec"], RAY_CLUSTER)
    spec = tree["spec"]
    accounts = {each["metadata"]["name"] for each in manifests() if each["kind"] == "ServiceAccount"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert pod["serviceAccountName"] in accounts
        assert pod["restartPolicy"] == "Never"  # what autoscaler v2 asks for
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        # A pod that may take more than it asked for is the first to be evicted.
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
        assert {"name": "RAY_START_ULIMIT_OPEN_FILES", "value": "65536"} in container["env"]
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"]
    gpu = spec["workerGroupSpecs"][1]["template"]["spec"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]
    capacity = [
        group["template"]["spec"]["nodeSelector"]["eks.amazonaws.com/capacityType"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    assert capacity == ["ON_DEMAND", "SPOT", "SPOT"]


# All files together


def test_pins_are_exact_and_the_same() -> None:
    ray = locked("ray")
    [project] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    images = {word for word in words(cluster()) if word.startswith("rayproject/")}
    assert images == {f"rayproject/ray:{ray}-py311-cpu", f"rayproject/ray:{ray}-py311-gpu"}
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert re.findall(r"^FROM (.*)$", dockerfile, re.M) == [f"rayproject/ray:{ray}-py311-${{KIND}}"]
    spec = ray_cluster()["spec"]
    assert spec["rayVersion"] == ray
    used = {word.partition("/")[2] for word in words(spec) if re.search(r"/faces2voices:", word)}
    assert used == {f"faces2voices:{project}-cpu", f"faces2voices:{project}-gpu"}
    assert used == set(re.findall(r"-t REGISTRY/(\S+) ", dockerfile))
    [torch] = re.findall(r"^torch=(.*)$", (ROOT / "deploy/install.sh").read_text(), re.M)
    assert re.search(rf"^TORCH \?= {torch}$", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_credentials(path: Path) -> None:
    text = path.read_text()
    secret = r"AKIA|ASIA|aws_(access|secret|session)|password|passwd|BEGIN .*PRIVATE|ssh_private_key|api.?key"
    assert not re.search(secret, text, re.I)
    assert not re.search(r"[A-Za-z0-9+]{40,}", text)  # as long as a secret key


def test_commands_name_files_that_exist() -> None:
    tree = cluster()
    assert {remote: (ROOT / local).resolve() for remote, local in tree["file_mounts"].items()} == {CHECKOUT: ROOT}
    text = CLUSTER.read_text() + (ROOT / "deploy/Dockerfile").read_text()
    named = re.findall(rf"{CHECKOUT}/(\S+)", text) + re.findall(r"\b(deploy/[\w./]+\w|docs/[\w./]+\w)", text)
    assert "deploy/install.sh" in named
    for name in named:
        assert (ROOT / name).is_file(), name
    install = (ROOT / "deploy/install.sh").read_text()
    for name in re.findall(r"\$checkout/([\w.]+)", install):
        assert (ROOT / name).is_file(), name


def test_the_install_script_is_bash_and_knows_two_kinds() -> None:
    script = ROOT / "deploy/install.sh"
    subprocess.run(["bash", "-n", script], check=True)
    wrong = subprocess.run(["bash", script, "tpu"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "install.sh: cpu or gpu, not tpu"


PYTHON = """#!/bin/bash
# An environment whose pip leaves a torch of the same version alone, as the real one does.
cd "$(dirname "$0")"
echo "$*" >> calls
case "$*" in
    *torch.version.cuda*) [ -f torch ] && cat torch ;;
    *uninstall*) rm -f torch ;;
    *"install --index-url"*torch==*) [ -f torch ] || echo cpu > torch ;;
    *install*torch==*) [ -f torch ] || echo "${INDEX_HAS:-gpu}" > torch ;;
esac
"""


def install(kind: str, there: Path | None, **settings: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "deploy/install.sh"), kind, *([str(there)] if there else [])]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})


@pytest.mark.parametrize("before", ["none", "cpu", "gpu"])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_install_script_leaves_torch_of_its_kind(tmp_path: Path, kind: str, before: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    if before != "none":
        (folder / "torch").write_text(f"{before}\n")
    done = install(kind, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "torch").read_text() == f"{kind}\n"
    assert ("uninstall" in (folder / "calls").read_text()) == (before != kind)


def test_the_install_script_refuses_the_wrong_torch_and_python(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    wrong = install("gpu", tmp_path, INDEX_HAS="cpu")
    assert wrong.returncode == 1
    assert "is a build for cpu, not for gpu" in wrong.stderr
    assert "requirements.lock" not in (folder / "calls").read_text()
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    none = install("cpu", tmp_path / "new", PYTHON=str(old))
    assert none.returncode == 1
    assert none.stderr.strip() == "install.sh: Python 3.11 to 3.13 is needed; name one with PYTHON=python3.11"
    assert not (tmp_path / "new").exists()
