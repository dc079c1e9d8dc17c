"""What srun's variables mean to torch, and the batch scripts that are written for it."""

from smalti.training.slurm import join_step

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_tasks_of_a_step_become_the_processes_of_a_run() -> None:
    found = dict(STEP)
    join_step(found)
    port = found.pop("MASTER_PORT")
    assert {key: value for key, value in found.items() if key not in STEP} == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    ports = []
    for job, step in (("1234567", "0"), ("1234567", "1"), ("1234568", "0")):
        other = STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        join_step(other)
        ports.append(other["MASTER_PORT"])
    assert ports[0] == port and len(set(ports)) == 3 and all(1024 < int(one) < 2**16 for one in ports)


def test_a_batch_script_a_single_task_and_another_launcher_are_left_alone() -> None:
    script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for environment in (script, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"WORLD_SIZE": "2", "RANK": "0"}):
        found = dict(environment)
        join_step(found)
        assert found == environment


def test_an_address_that_the_user_sets_stays() -> None:
    found = STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    join_step(found)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "29500")
