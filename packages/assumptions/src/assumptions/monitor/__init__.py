"""`assumptions monitor`: a local page where a person talks with the model, sees what it assumes, and changes it.

subject.py       the model with probes, directions and instrument: read scores, turn settings into edits, ask
session.py       transcripts: one JSON file a session, and its Markdown
conversation.py  one turn: read the message, stream the replies, keep the transcript
desk.py          the one thread that the model works in; requests wait in line
server.py        the HTTP routes and the page's assets
command.py       `assumptions monitor`
"""
