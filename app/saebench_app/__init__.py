"""The explorer: pages over a feature store, served by Streamlit on this machine.

    launch      starts the server for one store; serve: its process
    main        what the server runs for every page
    view        which features, in which order: read from the URL and written to it
    session     the open store, the generation a person is looking at
    runs        the run that an SAE came from, its model, and whose turn it is to use it
    work        long work in processes beside the server: check, match, map, explain; worker is what they run
    page        one module a page, thin (a folder called "pages" would make Streamlit serve its files itself)
    components  the parts that pages are made of; static/ has their scripts and style sheets

Nothing here runs SQL or leaves the machine, and pages that run no model need none. Text from a store (tokens,
labels, names) is hostile until shown: it reaches the page only through the components of ``static/``, as text
nodes.
"""
