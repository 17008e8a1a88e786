"""The replicas of one teacher, as one: asked ahead of need, and none of them trusted blindly.

fleet         Fleet: a batch is cut into parts, sent on its way, and put together again; begin here
answer        a part, an answer and what is taken for one; the errors
dispatch      which part goes to which replica, and when
roster        who is there, who is one of us, and what each said last
replica       one server: its connection, and how it did so far
window        how many requests it may have under way
addresses     where replicas are; names are looked up again while the run goes on
credentials   TLS, and a token
"""

from student_trainer.fleet.answer import Answer, Audit, TeacherError, TeacherRefusedError, TeachersGoneError
from student_trainer.fleet.credentials import Credentials, Token
from student_trainer.fleet.dispatch import FleetState
from student_trainer.fleet.fleet import Fleet

__all__ = [
    "Answer", "Audit", "Credentials", "Fleet", "FleetState", "TeacherError", "TeacherRefusedError",
    "TeachersGoneError", "Token",
]  # fmt: skip
