"""stub"""


def write_report(progress, path):
    path.write_text("todo")
